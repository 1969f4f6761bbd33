//! The tree's own rules, without any tar around them.

use super::*;

fn dir() -> Node {
    Node { meta: Meta { mode: 0o755, ..Meta::default() }, kind: Kind::Dir(Children::new()) }
}

fn file(text: &str) -> Node {
    let content = Content::Inline(text.as_bytes().into());
    Node { meta: Meta { mode: 0o644, ..Meta::default() }, kind: Kind::File(content) }
}

fn symlink(to: &str) -> Node {
    Node { meta: Meta::default(), kind: Kind::Symlink(to.as_bytes().into()) }
}

/// Every path of the tree, files with their text.
fn listing(tree: &Tree) -> Vec<String> {
    fn walk(tree: &Tree, at: NodeIx, path: &str, out: &mut Vec<String>) {
        for (name, entry) in tree.children(at).unwrap() {
            let path = format!("{path}{}", String::from_utf8_lossy(name));
            match &tree.node(entry.node).kind {
                Kind::Dir(_) => {
                    out.push(format!("{path}/"));
                    walk(tree, entry.node, &format!("{path}/"), out);
                }
                Kind::File(Content::Inline(text)) => {
                    out.push(format!("{path}={}", String::from_utf8_lossy(text)));
                }
                _ => out.push(path),
            }
        }
    }
    let mut out = Vec::new();
    walk(tree, NodeIx::ROOT, "", &mut out);
    out
}

fn rule<T: std::fmt::Debug>(result: Result<T, Refusal>) -> Rule {
    result.unwrap_err().rule
}

#[test]
fn a_whiteout_hides_only_what_lies_below() {
    let mut tree = Tree::new();
    tree.add(b"a/old", file("1")).unwrap();
    tree.add(b"a/both", file("1")).unwrap();
    tree.begin_layer();
    tree.add(b"a/both", file("2")).unwrap();
    tree.whiteout(b"a", b"both").unwrap();
    tree.whiteout(b"a", b"old").unwrap();
    tree.whiteout(b"a", b"never").unwrap();
    tree.whiteout(b"nowhere", b"x").unwrap();
    assert_eq!(listing(&tree), ["a/", "a/both=2"]);
}

#[test]
fn opaque_keeps_this_layer_whatever_the_order() {
    let mut tree = Tree::new();
    tree.add(b"d/low/x", file("1")).unwrap();
    tree.add(b"d/y", file("1")).unwrap();
    tree.begin_layer();
    tree.add(b"d/low/new", file("2")).unwrap();
    tree.opaque(b"d").unwrap();
    tree.add(b"d/after", file("2")).unwrap();
    assert_eq!(listing(&tree), ["d/", "d/after=2", "d/low/", "d/low/new=2"]);
}

#[test]
fn whiteout_after_the_directory_itself_empties_it() {
    let mut tree = Tree::new();
    tree.add(b"d/x", file("1")).unwrap();
    tree.begin_layer();
    tree.add(b"d", dir()).unwrap();
    tree.whiteout(b"", b"d").unwrap();
    assert_eq!(listing(&tree), ["d/"]);
}

#[test]
fn an_upper_layer_replaces_kinds() {
    let mut tree = Tree::new();
    tree.add(b"d/x", file("1")).unwrap();
    tree.add(b"f", file("1")).unwrap();
    tree.begin_layer();
    tree.add(b"d", file("2")).unwrap();
    tree.add(b"f", dir()).unwrap();
    assert_eq!(listing(&tree), ["d=2", "f/"]);
}

#[test]
fn rules_have_their_names() {
    let mut tree = Tree::new();
    tree.add(b"link", symlink("/etc")).unwrap();
    tree.add(b"f", file("")).unwrap();
    assert_eq!(rule(tree.add(b"/abs", dir())), Rule::Absolute);
    assert_eq!(rule(tree.add(b"a/../b", dir())), Rule::DotDot);
    assert_eq!(rule(tree.add(b"link/passwd", file("x"))), Rule::ThroughSymlink);
    assert_eq!(rule(tree.whiteout(b"link", b"passwd")), Rule::ThroughSymlink);
    assert_eq!(rule(tree.opaque(b"link")), Rule::ThroughSymlink);
    assert_eq!(rule(tree.hardlink(b"x", b"link/passwd")), Rule::ThroughSymlink);
    assert_eq!(rule(tree.hardlink(b"link/x", b"f")), Rule::ThroughSymlink);
    assert_eq!(rule(tree.add(b"f/x", file("x"))), Rule::ThroughFile);
    assert_eq!(rule(tree.add(b"f", file("y"))), Rule::Duplicate);
    assert_eq!(rule(tree.hardlink(b"f", b"link")), Rule::Duplicate);
    assert_eq!(rule(tree.hardlink(b"f", b"f")), Rule::Hardlink);
    assert_eq!(rule(tree.hardlink(b"x", b"")), Rule::Hardlink);
    assert_eq!(rule(tree.hardlink(b"x", b"nothing")), Rule::Hardlink);
    assert_eq!(rule(tree.whiteout(b"", b"..")), Rule::Whiteout);
    assert_eq!(rule(tree.add(b"a\0b", dir())), Rule::Path);
    assert_eq!(rule(tree.add(&[b'a'; 256], dir())), Rule::Path);
    assert_eq!(rule(tree.add(&b"a/".repeat(1_100), dir())), Rule::Path);
    assert_eq!(rule(tree.add(b"", file("x"))), Rule::Kind);
}

#[test]
fn the_same_directory_twice_is_fine_only_in_the_same_words() {
    let mut tree = Tree::new();
    tree.add(b"d/x", file("1")).unwrap();
    tree.add(b"d", dir()).unwrap();
    tree.add(b"d", dir()).unwrap();
    let mut other = dir();
    other.meta.mode = 0o700;
    assert_eq!(rule(tree.add(b"d", other)), Rule::Duplicate);
}
