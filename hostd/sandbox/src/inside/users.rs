//! Who a program runs as: `user[:group]` of an image config, looked up in the image's own files.
//!
//! Those files are hostile: read only where regular, only so far, and never through a device.
//! Left out: password databases other than `/etc/passwd` and `/etc/group`.

use std::io::Read;

use rustix::fs::{Mode, OFlags};

use crate::error::Fault;

/// Longest part of `/etc/passwd` or `/etc/group` that is looked at.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Supplementary groups that are taken.
const GROUPS_MAX: usize = 64;

/// A resolved user.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

/// Resolves `wanted` inside the current root.
pub(super) fn resolve(wanted: &str) -> Result<User, Fault> {
    if matches!(wanted, "" | "root" | "0" | "0:0") {
        // Read no file for the usual case: on a lazy root each file may be a fetch.
        return Ok(User { uid: 0, gid: 0, groups: Vec::new(), home: "/root".into() });
    }
    let passwd = read("/etc/passwd");
    let group = read("/etc/group");
    resolve_in(wanted, &passwd, &group).ok_or_else(|| Fault::NoSuchUser { user: wanted.to_owned() })
}

fn read(path: &str) -> String {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let Ok(fd) = rustix::fs::open(path, flags, Mode::empty()) else { return String::new() };
    let regular = rustix::fs::fstat(&fd).is_ok_and(|s| {
        rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::RegularFile
    });
    let mut bytes = Vec::new();
    if regular {
        let _ = std::fs::File::from(fd).take(FILE_BYTES_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn resolve_in(wanted: &str, passwd: &str, group: &str) -> Option<User> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((u, g)) => (u, Some(g)),
        None => (wanted, None),
    };
    let numeric: Option<u32> = user.parse().ok();
    let entry = passwd.lines().find_map(|line| {
        let f: Vec<&str> = line.split(':').collect();
        let (name, uid, gid) = (*f.first()?, f.get(2)?.parse().ok()?, f.get(3)?.parse().ok()?);
        let hit = name == user || numeric == Some(uid);
        hit.then(|| (name.to_owned(), uid, gid, f.get(5).copied().unwrap_or("/").to_owned()))
    });
    let (name, uid, mut gid, home) = match (entry, numeric) {
        (Some(found), _) => found,
        (None, Some(uid)) => (String::new(), uid, 0, "/".to_owned()),
        (None, None) => return None,
    };
    let mut groups = Vec::new();
    if let Some(wanted_group) = wanted_group {
        let named = || group_lines(group).find(|(n, ..)| *n == wanted_group).map(|(_, g, _)| g);
        gid = wanted_group.parse().ok().or_else(named)?;
    } else if !name.is_empty() {
        let member = |list: &str| list.split(',').any(|m| m.trim() == name);
        groups = group_lines(group).filter(|(.., m)| member(m)).map(|(_, g, _)| g).collect();
        groups.truncate(GROUPS_MAX);
    }
    Some(User { uid, gid, groups, home })
}

fn group_lines(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let f: Vec<&str> = line.split(':').collect();
        Some((*f.first()?, f.get(2)?.parse().ok()?, f.get(3).copied().unwrap_or("")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:w:/var/www:/bin/sh\njunk\n";
    const GROUP: &str = "root:x:0:\nweb:x:33:\nlog:x:40:root,web\n";

    #[test]
    fn names_numbers_and_groups() {
        let web = resolve_in("web", PASSWD, GROUP).unwrap();
        assert_eq!((web.uid, web.gid, web.groups), (33, 33, vec![40]));
        assert_eq!(web.home, "/var/www");
        let number = resolve_in("1000", PASSWD, GROUP).unwrap();
        assert_eq!((number.uid, number.gid, number.home.as_str()), (1000, 0, "/"));
        let pair = resolve_in("web:log", PASSWD, GROUP).unwrap();
        assert_eq!((pair.uid, pair.gid), (33, 40));
        assert_eq!(resolve_in("7:8", PASSWD, GROUP).map(|u| (u.uid, u.gid)), Some((7, 8)));
    }

    #[test]
    fn unknown_ones_are_refused() {
        assert_eq!(resolve_in("nobody", PASSWD, GROUP), None);
        assert_eq!(resolve_in("web:nogroup", PASSWD, GROUP), None);
        assert_eq!(resolve_in("4294967296", PASSWD, GROUP), None);
        assert_eq!(resolve_in("-1", PASSWD, GROUP), None);
    }
}
