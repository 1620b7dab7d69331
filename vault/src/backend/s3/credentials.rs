//! The keys of an S3 account: from a file or from the environment, never from an address.

use std::path::Path;

use zeroize::Zeroizing;

/// Who signs the requests. Has no `Debug`.
pub(super) struct Credentials {
    pub(super) id: String,
    pub(super) secret: Zeroizing<String>,
    pub(super) token: Option<Zeroizing<String>>,
}

impl Credentials {
    /// From a file in the form of `~/.aws/credentials`, its section `default`, or without a file from the environment.
    ///
    /// # Errors
    /// A sentence that says what is missing, and none of what is there.
    pub(super) fn read(file: Option<&Path>) -> Result<Self, String> {
        let Some(file) = file else {
            return Self::from_pairs(|key| std::env::var(key.to_ascii_uppercase()).ok()).ok_or_else(|| {
                "no credentials: give a file, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".to_owned()
            });
        };
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let text = Zeroizing::new(text);
        Self::parse(&text).ok_or_else(|| {
            format!("{}: no aws_access_key_id and aws_secret_access_key in [default]", file.display())
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut section = "default";
        let mut pairs = Vec::new();
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                section = name.trim();
            } else if section == "default"
                && !line.starts_with(['#', ';'])
                && let Some((key, value)) = line.split_once('=')
            {
                pairs.push((key.trim(), value.trim()));
            }
        }
        Self::from_pairs(|key| {
            let found = pairs.iter().find(|(name, _)| *name == key);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    fn from_pairs(find: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let find = |key| find(key).filter(|value| !value.is_empty());
        Some(Self {
            id: find("aws_access_key_id")?,
            secret: Zeroizing::new(find("aws_secret_access_key")?),
            token: find("aws_session_token").map(Zeroizing::new),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_default_of_a_file_is_read() {
        let text = "[other]\naws_access_key_id = WRONG\n[default]\n# said so\naws_access_key_id = AKIA\n\
                    aws_secret_access_key=a/b=c\n[more]\naws_session_token = WRONG\n";
        let read = Credentials::parse(text).unwrap();
        assert_eq!((read.id.as_str(), read.secret.as_str(), read.token), ("AKIA", "a/b=c", None));
        assert!(Credentials::parse("aws_access_key_id = AKIA\n").is_none());
    }

    #[test]
    fn what_is_missing_is_said_without_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("credentials");
        std::fs::write(&file, "[default]\naws_secret_access_key = hunter2\n").unwrap();
        let error = Credentials::read(Some(&file)).err().unwrap();
        assert!(error.contains("aws_access_key_id") && !error.contains("hunter2"), "{error}");
    }
}
