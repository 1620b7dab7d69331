use super::*;

fn parsed(text: &str) -> Address {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn each_kind_of_address_is_read_and_printed_as_it_was_written() {
    for text in [
        "file:///srv/vault",
        "s3://backups/",
        "s3://backups/site/a?endpoint=https://minio.lan:9000&region=us-east-1",
        "s3://backups/?region=eu-central-1",
        "sftp://vault@nas.lan:2222/srv/vault",
        "sftp://nas/~/vault",
        "sftp://vault@[fe80::1]:22/srv/vault",
    ] {
        assert_eq!(parsed(text).to_string(), text);
    }
    assert_eq!(parsed("file:///srv/my%20vault"), Address::File("/srv/my vault".into()));
    let Address::Sftp { path, port, user, .. } = parsed("sftp://nas/~/vault/") else { panic!() };
    assert_eq!((path.as_str(), port, user), ("vault", None, None));
}

#[test]
fn a_secret_in_an_address_is_refused_and_not_repeated() {
    for text in [
        "sftp://user:hunter2@nas/srv/vault",
        "s3://AKIA:hunter2@bucket/prefix",
        "s3://hunter2@bucket/prefix",
        "s3://bucket/?secret_access_key=hunter2",
        "s3://bucket/?region=eu&hunter2",
        "s3://bucket/?endpoint=https://me:hunter2@minio.lan",
        "file://user:hunter2@host/srv",
    ] {
        let error = text.parse::<Address>().unwrap_err();
        assert_eq!(error.remedy, SECRETS, "{text}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
}

#[test]
fn what_is_no_address_of_a_vault_is_refused() {
    for text in [
        "/srv/vault",
        "http://host/vault",
        "file://host/srv/vault",
        "file:///",
        "file:backup",
        "file:/backup",
        "file://",
        "file:backup/a/b",
        "file:///srv?x=1",
        "s3:///prefix",
        "s3://bucket/a/../b",
        "s3://bucket/%2E./b",
        "file:///srv/../etc",
        "s3://bucket/a//b",
        "s3://bucket/?endpoint=ftp://host",
        "s3://bucket/?region=a&region=b",
        "sftp://nas",
        "sftp://nas/",
        "sftp:///srv/vault",
        "sftp://-oProxyCommand=x/srv/vault",
        "sftp://-l@nas/srv/vault",
        "sftp://a%20b@nas/srv/vault",
        "sftp://nas/srv/vault#x",
        "file:///srv/%00",
    ] {
        assert!(text.parse::<Address>().is_err(), "{text}");
    }
}
