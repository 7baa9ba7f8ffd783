//! Descriptors that come through a socket.

use std::{
    io::{self, IoSliceMut},
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// One message of at most 4096 bytes and the descriptor beside it: sent in one call, they arrive together.
///
/// # Errors
/// The kernel's.
pub fn receive(socket: RawFd) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (length, fd) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let fds = message.cmsgs()?.find_map(|one| match one {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        (message.bytes, fds)
    };
    bytes.truncate(length);
    // SAFETY: the kernel made this descriptor for this process in recvmsg(2); nobody else owns it.
    Ok((bytes, fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })))
}
