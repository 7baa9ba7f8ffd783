//! Whom a program runs as, as images name it, by the guest's own `/etc/passwd` and `/etc/group`.
//!
//! As Docker has it: nothing is root; a name is looked up; a number need not be known, and then has the group 0 and the home
//! `/`. Supplementary groups are those that list the user, unless a group is named.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use tiffin_protocol::{Failure, FailureCode};

use crate::request::failure;

/// Bytes of each file that are looked at.
const MAX_FILE: u64 = 1 << 20;

/// Supplementary groups of a user; a kernel takes no more.
const MAX_GROUPS: usize = 65_536;

/// A user, as a process has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home folder.
    pub home: String,
}

/// The user that `text` means in this guest.
///
/// # Errors
/// `BadUser`, saying what is unknown.
pub fn resolve(text: &str) -> Result<User, Failure> {
    find(text, &read("/etc/passwd"), &read("/etc/group")).map_err(|why| failure(FailureCode::BadUser, &why))
}

/// The guest owns the file: it may be anything. What was read before an error is as good as a shorter file.
fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    // Not to be stuck when it is a FIFO.
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    if let Ok(file) = file {
        let _ = file.take(MAX_FILE).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn find(text: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, named_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = id(user);
    let account =
        passwd.lines().filter_map(Account::parse).find(|account| account.name == user || Some(account.uid) == number);
    let (uid, own_gid, name, home) = match (account, number) {
        (Some(account), _) => (account.uid, account.gid, Some(account.name), account.home),
        (None, Some(uid)) => (uid, 0, None, ""),
        (None, None) => return Err(format!("the VM's /etc/passwd knows no user {user:?}")),
    };
    let (gid, groups) = match (named_group, name) {
        (Some(named), _) => (group_id(named, group)?, Vec::new()),
        (None, Some(name)) => (own_gid, groups_of(name, group)),
        (None, None) => (own_gid, Vec::new()),
    };
    let home = if home.is_empty() || home.contains('\0') { "/" } else { home };
    Ok(User { uid, gid, groups, home: home.to_owned() })
}

/// A user's or group's number. The last one means "no change" to the kernel.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX && text.bytes().all(|byte| byte.is_ascii_digit()))
}

fn group_id(named: &str, group: &str) -> Result<u32, String> {
    let number = id(named);
    let known = group.lines().filter_map(Group::parse).find(|group| group.name == named || Some(group.gid) == number);
    known.map(|group| group.gid).or(number).ok_or_else(|| format!("the VM's /etc/group knows no group {named:?}"))
}

fn groups_of(name: &str, group: &str) -> Vec<u32> {
    let lists = |group: &Group<'_>| group.members.split(',').any(|member| member == name);
    group.lines().filter_map(Group::parse).filter(lists).map(|group| group.gid).take(MAX_GROUPS).collect()
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (uid, gid) = (id(fields.nth(1)?)?, id(fields.next()?)?);
        Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    }
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        Some(Group { name, gid: id(fields.nth(1)?)?, members: fields.next().unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nwww:x:33:34:www:/var/www:/bin/false\n7:x:70:71::/seven:\nn:x:8:9\n";
    const GROUP: &str = "root:x:0:\ndata:x:50:www,other\nbroken\nmore:x:51:a,www\n7:x:77:\nwww:x:34:\n";

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> Result<User, String> {
        Ok(User { uid, gid, groups: groups.to_vec(), home: home.to_owned() })
    }

    #[test]
    fn every_form_that_images_use_is_understood() {
        for (text, meant) in [
            ("", user(0, 0, &[], "/root")),
            ("root", user(0, 0, &[], "/root")),
            ("www", user(33, 34, &[50, 51], "/var/www")),
            ("33", user(33, 34, &[50, 51], "/var/www")),
            ("www:data", user(33, 50, &[], "/var/www")),
            ("www:60", user(33, 60, &[], "/var/www")),
            ("33:34", user(33, 34, &[], "/var/www")),
            ("1234", user(1234, 0, &[], "/")),
            ("1234:1235", user(1234, 1235, &[], "/")),
            ("1234:data", user(1234, 50, &[], "/")),
            // A name that looks like a number is a name first.
            ("7", user(70, 71, &[], "/seven")),
            ("7:7", user(70, 77, &[], "/seven")),
            (":data", user(0, 50, &[], "/root")),
            ("www:", user(33, 34, &[50, 51], "/var/www")),
            ("n", user(8, 9, &[], "/")),
        ] {
            assert_eq!(find(text, PASSWD, GROUP), meant, "{text:?}");
        }
    }

    #[test]
    fn an_unknown_user_or_group_is_named() {
        for (text, named) in [("nobody", "user \"nobody\""), ("www:nobody", "group \"nobody\""), ("-1", "user \"-1\"")]
        {
            let why = find(text, PASSWD, GROUP).unwrap_err();
            assert!(why.contains(named), "{why}");
        }
        assert!(find("4294967295", "", "").is_err(), "it would mean no change");
        assert!(find("+5", "", "").is_err());
    }

    #[test]
    fn without_files_numbers_still_work() {
        assert_eq!(find("", "", ""), user(0, 0, &[], "/"));
        assert_eq!(find("5:6", "", ""), user(5, 6, &[], "/"));
    }

    proptest! {
        #[test]
        fn any_files_and_any_user_give_an_answer(text in ".{0,20}", passwd in ".{0,200}", group in ".{0,200}") {
            if let Ok(user) = find(&text, &passwd, &group) {
                prop_assert!(user.uid != u32::MAX && user.gid != u32::MAX && !user.home.contains('\0'));
            }
        }
    }
}
