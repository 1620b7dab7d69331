//! A plan as DOT.

use std::collections::HashMap;
use std::fmt::Write as _;

use vmkeep_workflow::plan::{Plan, StepSpec};

/// Draws a plan. Boxes are steps with their name, what they do, their kind and their phase; the arrows say what comes
/// before.
///
/// - double border: the point of no return;
/// - rounded: can be taken back;
/// - dashed arrow: closes what the other opened, whatever happened in between;
/// - shaded: the guest is in the job's hands, so the job cannot be paused there.
pub(super) fn draw(name: &str, plan: &Plan) -> String {
    let mut out = format!("digraph {} {{\n", quoted(name));
    let _ = writeln!(out, "  label={};", quoted(&plan.title));
    out.push_str("  labelloc=t;\n  rankdir=TB;\n  node [shape=box, fontname=\"sans-serif\", fontsize=10];\n");
    out.push_str("  edge [fontname=\"sans-serif\", fontsize=9];\n");
    let held = held(plan);
    for step in &plan.steps {
        let _ = writeln!(
            out,
            "  {} [{}];",
            quoted(step.name.as_str()),
            attributes(plan, step, held[step.name.as_str()])
        );
    }
    for step in &plan.steps {
        for before in &step.after {
            let _ = writeln!(out, "  {} -> {};", quoted(before.as_str()), quoted(step.name.as_str()));
        }
    }
    for step in &plan.steps {
        if let Some(opener) = &step.closes {
            let _ = writeln!(
                out,
                "  {} -> {} [style=dashed, color=gray40, constraint=false, label=\"closes\"];",
                quoted(step.name.as_str()),
                quoted(opener.as_str())
            );
        }
    }
    out.push_str("}\n");
    out
}

fn attributes(plan: &Plan, step: &StepSpec, held: bool) -> String {
    let phase = step.stage.as_ref().map(|stage| format!(" · {stage}")).unwrap_or_default();
    let label = format!("{}\n{}\n{}{phase}", step.name, step.title, step.kind);
    let mut styles = Vec::new();
    if step.undo.is_some() {
        styles.push("rounded");
    }
    if held {
        styles.push("filled");
    }
    let mut text = format!("label={}", quoted(&label));
    if !styles.is_empty() {
        let _ = write!(text, ", style={}", quoted(&styles.join(",")));
    }
    if held {
        text.push_str(", fillcolor=\"#fff3d6\"");
    }
    if plan.point_of_no_return.as_ref() == Some(&step.name) {
        text.push_str(", peripheries=2, xlabel=\"point of no return\"");
    }
    if step.safety {
        text.push_str(", color=\"#b00020\"");
    }
    text
}

/// For each step whether it lies between a critical opener and the last of its closers.
fn held(plan: &Plan) -> HashMap<&str, bool> {
    let mut held: HashMap<&str, bool> = plan.steps.iter().map(|step| (step.name.as_str(), false)).collect();
    for opener in plan.steps.iter().filter(|step| step.critical) {
        let closers: Vec<&str> = plan
            .steps
            .iter()
            .filter(|step| step.closes.as_ref() == Some(&opener.name))
            .map(|step| step.name.as_str())
            .collect();
        for step in &plan.steps {
            let name = step.name.as_str();
            let after = name == opener.name.as_str() || leads(plan, opener.name.as_str(), name);
            let before = closers.iter().any(|closer| *closer == name || leads(plan, name, closer));
            if after && before {
                held.insert(name, true);
            }
        }
    }
    held
}

/// Whether one step comes before another, directly or not.
fn leads(plan: &Plan, from: &str, to: &str) -> bool {
    let Some(step) = plan.steps.iter().find(|step| step.name.as_str() == to) else { return false };
    step.after.iter().any(|before| before.as_str() == from || leads(plan, from, before.as_str()))
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use vmkeep_workflow::{StepKind, StepName};

    use super::*;

    #[test]
    fn a_plan_is_drawn_with_its_barrier_closers_and_held_section() {
        let step =
            |name: &'static str| StepSpec::new(name, StepKind::new("kind", 1), "does \"x\"", Value::Null);
        let steps = vec![
            step("a").undoable(),
            step("open").after("a").critical(),
            step("work").after("open"),
            step("close").after("work").closes("open").safety(),
            step("last").after("close"),
        ];
        let plan = Plan::new("w", 1, "a title", steps, Some(StepName::from("work")), Value::Null).unwrap();
        let dot = draw("w", &plan);
        assert!(dot.contains("\"a\" -> \"open\";"));
        assert!(dot.contains("\"close\" -> \"open\" [style=dashed"));
        let line =
            |name: &str| dot.lines().find(|l| l.starts_with(&format!("  \"{name}\" ["))).unwrap().to_owned();
        assert!(line("work").contains("peripheries=2") && line("work").contains("filled"));
        assert!(line("a").contains("rounded") && !line("a").contains("filled"));
        assert!(!line("last").contains("filled"));
        assert!(dot.contains("does \\\"x\\\""));
    }
}
