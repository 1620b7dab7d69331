//! Rows of results, and how they are judged and shown.

use serde::Serialize;

/// Whether a target was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Judgement {
    Met,
    Missed,
    /// The spread of the rounds is wider than the distance to the target.
    Inconclusive,
    /// There is no target: the figure is for information.
    None,
}

/// The samples of one side.
#[derive(Clone, Debug)]
pub struct Samples(pub Vec<f64>);

impl Samples {
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    /// Half the distance between the quartiles, relative to the median.
    pub fn spread(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let quartile = |q: usize| sorted[(sorted.len() - 1) * q / 4];
        (quartile(3) - quartile(1)) / 2.0 / self.median().max(f64::MIN_POSITIVE)
    }
}

/// Where a ratio must lie.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
}

/// One figure beside its peer's.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub value: f64,
    pub unit: String,
    pub peer: String,
    pub peer_value: f64,
    pub ratio: f64,
    /// The relative spread of the ratio over the rounds.
    pub spread: f64,
    pub target: String,
    pub met: Judgement,
}

impl Row {
    /// Ours against a peer measured in the same run: the ratio is the median of the rounds' ratios.
    pub fn against(
        name: &str,
        unit: &str,
        ours: &Samples,
        peer: &str,
        theirs: &Samples,
        target: Target,
    ) -> Self {
        let ratios = Samples(ours.0.iter().zip(&theirs.0).map(|(a, b)| a / b).collect());
        let (ratio, spread) = (ratios.median(), ratios.spread());
        let (target, good, margin) = match target {
            Target::AtMost(most) => (format!("<= {most}"), ratio <= most, (most - ratio).abs() / ratio),
            Target::AtLeast(least) => (format!(">= {least}"), ratio >= least, (ratio - least).abs() / ratio),
        };
        let met = match (good, spread > margin) {
            (_, true) => Judgement::Inconclusive,
            (true, false) => Judgement::Met,
            (false, false) => Judgement::Missed,
        };
        Self {
            name: name.to_owned(),
            value: ours.median(),
            unit: unit.to_owned(),
            peer: peer.to_owned(),
            peer_value: theirs.median(),
            ratio,
            spread,
            target,
            met,
        }
    }

    /// Ours beside a peer, for information only.
    pub fn beside(name: &str, unit: &str, ours: &Samples, peer: &str, theirs: &Samples) -> Self {
        let row = Self::against(name, unit, ours, peer, theirs, Target::AtLeast(0.0));
        Self { target: "-".to_owned(), met: Judgement::None, ..row }
    }

    /// Ours against a fixed limit.
    pub fn limit(name: &str, unit: &str, ours: &Samples, most: f64) -> Self {
        let limit = Samples(vec![most; ours.0.len()]);
        Self::against(name, unit, ours, "the limit", &limit, Target::AtMost(1.0))
    }
}

pub fn print_json(rows: &[Row]) {
    match serde_json::to_string_pretty(rows) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("bench: {error}"),
    }
}

pub fn print(rows: &[Row]) {
    let wide = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).max(4);
    let peers = rows.iter().map(|row| row.peer.chars().count()).max().unwrap_or(0).max(4);
    println!(
        "{:wide$}  {:>12}  {:peers$}  {:>12}  {:>7}  {:>7}  {:>8}  met",
        "name", "value", "peer", "its value", "ratio", "spread", "target"
    );
    for row in rows {
        println!(
            "{:wide$}  {:>12}  {:peers$}  {:>12}  {:>7.2}  {:>6.0}%  {:>8}  {}",
            row.name,
            amount(row.value, &row.unit),
            row.peer,
            amount(row.peer_value, &row.unit),
            row.ratio,
            row.spread * 100.0,
            row.target,
            match row.met {
                Judgement::Met => "yes",
                Judgement::Missed => "NO",
                Judgement::Inconclusive => "inconclusive",
                Judgement::None => "-",
            }
        );
    }
}

fn amount(value: f64, unit: &str) -> String {
    match value {
        v if v >= 1000.0 => format!("{v:.0} {unit}"),
        v if v >= 10.0 => format!("{v:.1} {unit}"),
        v => format!("{v:.3} {unit}"),
    }
}
