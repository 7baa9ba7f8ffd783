//! Inodes: what one file, folder or link is, its names aside.

use super::{Ext4Error, Filesystem, array_at, crc32c, damaged, joined, joined_long, u16_at, u32_at};

const ENCRYPTED: u32 = 0x800;
const ATTRIBUTE_VALUE: u32 = 0x20_0000;
const EXTENTS: u32 = 0x8_0000;
const INLINE_DATA: u32 = 0x1000_0000;
/// Bytes of the block map, which holds short links and inline data too.
pub(super) const MAP_BYTES: usize = 60;
/// The longest target of a symbolic link that Linux takes.
const LINK_BYTES: u64 = 4095;

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A named pipe.
    Fifo,
    /// A character or block device.
    Device,
    /// A socket's name.
    Socket,
}

/// An inode.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Its number: names with the same number are one file.
    pub number: u32,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Bytes of its content.
    pub size: u64,
    /// How many names it says it has.
    pub links: u16,
    pub(super) map: [u8; MAP_BYTES],
    pub(super) extents: bool,
    pub(super) inline: bool,
    /// The block with the attributes that have no room in the inode; 0: none.
    pub(super) xattr_block: u64,
    /// What follows the fixed fields in the inode's slot: attributes.
    pub(super) tail: Vec<u8>,
}

impl Filesystem {
    /// Reads an inode.
    ///
    /// # Errors
    /// When there is none of that number, its checksum is wrong, it is free or encrypted.
    pub fn inode(&self, number: u32) -> Result<Inode, Ext4Error> {
        let mut slot = vec![0; usize::from(self.superblock.inode_bytes)];
        self.read_at(self.inode_at(number)?, &mut slot)?;
        self.check_inode(number, &slot)?;
        let inode = parse(number, slot, self.superblock.large_folders)?;
        Ok(inode)
    }

    fn inode_at(&self, number: u32) -> Result<u64, Ext4Error> {
        let superblock = &self.superblock;
        if number == 0 || number > superblock.inodes {
            return damaged(format!("there is no inode {number}"));
        }
        let (group, index) = ((number - 1) / superblock.inodes_per_group, (number - 1) % superblock.inodes_per_group);
        let mut descriptor = vec![0; usize::from(superblock.group_bytes)];
        self.read_at(superblock.groups_at + u64::from(group) * u64::from(superblock.group_bytes), &mut descriptor)?;
        let high = if superblock.group_bytes >= 64 { u32_at(&descriptor, 0x28)? } else { 0 };
        let table = joined_long(high, u32_at(&descriptor, 0x8)?).checked_mul(superblock.block_size);
        let at = table.and_then(|table| table.checked_add(u64::from(index) * u64::from(superblock.inode_bytes)));
        at.ok_or_else(|| Ext4Error::Damaged(format!("group {group} has its inodes nowhere")))
    }

    fn check_inode(&self, number: u32, slot: &[u8]) -> Result<(), Ext4Error> {
        let Some(seed) = self.superblock.checksum_seed else { return Ok(()) };
        let has_high = slot.len() > 128 && u16_at(slot, 0x80)? >= 4;
        let mut expected = u32::from(u16_at(slot, 0x7C)?);
        let mut cleared = slot.to_vec();
        cleared[0x7C..0x7E].fill(0);
        if has_high {
            expected = joined(u16_at(slot, 0x82)?, u16_at(slot, 0x7C)?);
            cleared[0x82..0x84].fill(0);
        }
        let mut found = crc32c(seed, &number.to_le_bytes());
        found = crc32c(found, &array_at::<4>(slot, 0x64)?);
        found = crc32c(found, &cleared);
        if !has_high {
            found &= 0xFFFF;
        }
        if found == expected { Ok(()) } else { damaged(format!("the checksum of inode {number} is wrong")) }
    }

    /// Where a symbolic link points to.
    ///
    /// # Errors
    /// When the target is empty, has a NUL byte or is longer than Linux allows.
    pub fn link_target(&self, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
        if inode.size == 0 || inode.size > LINK_BYTES {
            return damaged(format!("the symbolic link {} has a target of {} bytes", inode.number, inode.size));
        }
        let length = usize::try_from(inode.size).expect("at most 4095");
        let target = match inode.map.get(..length) {
            Some(short) if length < MAP_BYTES => short.to_vec(),
            _ => self.content(inode)?,
        };
        if target.contains(&0) {
            return damaged(format!("the symbolic link {} has a NUL byte in its target", inode.number));
        }
        Ok(target)
    }
}

fn parse(number: u32, mut slot: Vec<u8>, large_folders: bool) -> Result<Inode, Ext4Error> {
    let (mode, flags) = (u16_at(&slot, 0x0)?, u32_at(&slot, 0x20)?);
    let kind = match mode & 0xF000 {
        0x8000 => Kind::File,
        0x4000 => Kind::Folder,
        0xA000 => Kind::Link,
        0x1000 => Kind::Fifo,
        0x2000 | 0x6000 => Kind::Device,
        0xC000 => Kind::Socket,
        _ => return damaged(format!("inode {number} is of no kind, and has a name")),
    };
    if flags & ENCRYPTED != 0 {
        return Err(Ext4Error::Unsupported(
            "files in the filesystem are encrypted: upload one without encryption".into(),
        ));
    }
    if flags & ATTRIBUTE_VALUE != 0 {
        return damaged(format!("inode {number} holds an attribute's value, and has a name"));
    }
    let wide = kind == Kind::File || kind == Kind::Folder && large_folders;
    let inode = Inode {
        number,
        kind,
        mode: u32::from(mode & 0o7777),
        uid: joined(u16_at(&slot, 0x78)?, u16_at(&slot, 0x2)?),
        gid: joined(u16_at(&slot, 0x7A)?, u16_at(&slot, 0x18)?),
        size: joined_long(if wide { u32_at(&slot, 0x6C)? } else { 0 }, u32_at(&slot, 0x4)?),
        links: u16_at(&slot, 0x1A)?,
        map: array_at(&slot, 0x28)?,
        extents: flags & EXTENTS != 0,
        inline: flags & INLINE_DATA != 0,
        xattr_block: joined_long(u16_at(&slot, 0x76)?.into(), u32_at(&slot, 0x68)?),
        tail: Vec::new(),
    };
    let tail_at = if slot.len() > 128 { 128 + usize::from(u16_at(&slot, 0x80)?) } else { slot.len() };
    if tail_at > slot.len() {
        return damaged(format!("the fields of inode {number} reach beyond it"));
    }
    Ok(Inode { tail: slot.split_off(tail_at), ..inode })
}
