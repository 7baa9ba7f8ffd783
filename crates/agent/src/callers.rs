//! Who is connected, so that a guest that becomes another can hang up on the callers of the one that it was.
//!
//! A machine is saved with its connections, and where it goes on nobody is at their other ends: what waits for its caller would
//! wait for ever, in one of the few places that there are for callers.

use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{setsockopt, sockopt};

/// See the module.
#[derive(Debug, Default)]
pub struct Callers(Mutex<Vec<Arc<TcpStream>>>);

impl Callers {
    /// Notes a connection for as long as what is answered lives.
    pub fn enter<'a>(&'a self, socket: &'a Arc<TcpStream>) -> Entered<'a> {
        self.all().push(Arc::clone(socket));
        Entered { callers: self, socket }
    }

    /// Ends all connections but `own`. Who serves one finds that its caller has gone.
    pub fn hang_up_on_others(&self, own: &TcpStream) {
        for socket in self.all().iter().filter(|socket| !std::ptr::eq(Arc::as_ptr(socket), own)) {
            // By a reset: nobody is there to acknowledge an orderly end, which would be repeated for minutes.
            let _ = setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Arc<TcpStream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that is noted.
#[derive(Debug)]
pub struct Entered<'a> {
    callers: &'a Callers,
    socket: &'a Arc<TcpStream>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.callers.all().retain(|socket| !Arc::ptr_eq(socket, self.socket));
    }
}
