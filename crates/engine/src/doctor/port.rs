//! The ports that the API and the ingress are to listen on: free, ours already, or somebody else's.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use super::{Check, DoctorInput, Level};

const NAME: &str = "port";
const INGRESS: &str = "ingress port";
const LIMIT: Duration = Duration::from_millis(500);

pub(super) fn check(input: &DoctorInput) -> Vec<Check> {
    let api = input.listen.map(port);
    // What holds the ingress's port beside a server that answers is that server's ingress, as far as can be told.
    let is_ours = api.as_ref().is_some_and(|api| api.level == Level::Warn);
    api.into_iter().chain(input.ingress.map(|address| ingress(address, is_ours))).collect()
}

fn ingress(address: SocketAddr, is_ours: bool) -> Check {
    match TcpListener::bind(address) {
        Ok(_) => Check::ok(INGRESS, format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_ours => {
            let remedy = "nothing, if that is the Tiffin that you want to run; else stop it";
            Check::warn(INGRESS, format!("{address} is taken, as it is by a server that runs"), remedy)
        }
        Err(error) => {
            let remedy = "stop what listens there, or set ingress.listen to another address, or to off";
            Check::fail(INGRESS, format!("{address}: {error}"), remedy)
        }
    }
}

fn port(address: SocketAddr) -> Check {
    let elsewhere = "stop what listens there, or choose another address with the setting listen";
    match TcpListener::bind(address) {
        Ok(_) => Check::ok(NAME, format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if answers_health(address).unwrap_or(false) {
                let remedy = "nothing, if that is the Tiffin that you want to run; else stop it";
                Check::warn(NAME, format!("{address} is taken by a server that answers /health"), remedy)
            } else {
                Check::fail(NAME, format!("{address} is taken by something else"), elsewhere)
            }
        }
        Err(error) => Check::fail(NAME, format!("{address}: {error}"), elsewhere),
    }
}

fn answers_health(address: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: doctor\r\nConnection: close\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok(&head == b"HTTP/1.1 200")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_is_fine_and_one_that_somebody_holds_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(port(address).level, Level::Fail);
        drop(listener);
        assert_eq!(port(address).level, Level::Ok);
    }

    #[test]
    fn the_ingress_port_may_be_held_by_a_server_of_ours_and_by_nobody_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(ingress(address, true).level, Level::Warn);
        let refused = ingress(address, false);
        assert_eq!(refused.level, Level::Fail);
        assert!(refused.remedy.unwrap().contains("ingress.listen"));
        drop(listener);
        assert_eq!(ingress(address, false).level, Level::Ok);
    }

    #[test]
    fn a_server_that_answers_health_is_taken_for_ours() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 64];
            let read = stream.read(&mut request).unwrap();
            assert!(request[..read].starts_with(b"GET /health "));
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        });
        assert_eq!(port(address).level, Level::Warn);
        server.join().unwrap();
    }
}
