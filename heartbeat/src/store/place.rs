//! What `scylla://host:port[,host:port]/keyspace` names, looked at before anything is dialled.

use super::StoreError;

/// Nodes and keyspace of `host:port[,host:port]/keyspace`.
pub(super) fn parse(place: &str) -> Result<(Vec<&str>, &str), StoreError> {
    let bad = |why| StoreError::Config(format!("scylla://{place}: {why}"));
    let (nodes, keyspace) = place
        .split_once('/')
        .ok_or_else(|| bad("it needs a keyspace: scylla://host:port[,host:port]/keyspace"))?;
    let fits = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
    let named = keyspace.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
    if !named || keyspace.len() > 48 || !keyspace.bytes().all(fits) {
        return Err(bad("a keyspace has up to 48 of a-z, 0-9 and '_', and begins with a letter"));
    }
    let nodes: Vec<&str> = nodes.split(',').filter(|node| !node.is_empty()).collect();
    if nodes.is_empty() {
        return Err(bad("it names no node"));
    }
    Ok((nodes, keyspace))
}

/// Whether the setting names nodes and a keyspace: nothing that waiting would mend.
pub(super) fn check(place: &str) -> Result<(), StoreError> {
    parse(place).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_or_said_to_be_wrong() {
        assert_eq!(parse("a:1,b:2/volley").unwrap(), (vec!["a:1", "b:2"], "volley"));
        for bad in ["a:1", "/volley", "a:1/", "a:1/Volley", "a:1/x;drop", "a:1/1a"] {
            assert!(matches!(parse(bad), Err(StoreError::Config(_))), "{bad}");
        }
    }
}
