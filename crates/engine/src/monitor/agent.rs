//! What the monitor itself asks of the agent: to start the program, to end the guest, and to become another.
//!
//! Blocking, bounded in time, one connection per operation. What the agent answers is a guest's word: its kind is looked
//! at, and of a refusal the code.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, SocketAddrV4, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt},
};
use tiffin_protocol::{
    AGENT_PORT, Boot, Failure, FailureCode, HEADER, Kind, Link, MAX_FRAME, Op, Renew, Request, Shutdown, decode_header,
    encode,
};
use tiffin_types::{limits, program::Program};

use super::state::Vm;
use crate::host::network::{self, GUEST_V4};

/// How long a connection into the guest may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for the first attempt to reach a guest that is just going on: what was sent before it listened is lost, and TCP would
/// send it again after a second only.
const FIRST_DIAL: Duration = Duration::from_millis(20);
/// How long the agent has for an answer that needs no waiting.
const ANSWER: Duration = Duration::from_secs(5);
/// How long it has to look for a program and start it.
const START_PROGRAM: Duration = Duration::from_secs(10);
/// An answer is small; a longer one is no honest agent's.
const MAX_ANSWER: usize = 64 * 1024;
/// The host name of a guest that is no VM yet.
const NOBODY: &str = "tiffin";
/// Between two attempts to reach the agent.
const RETRY: Duration = Duration::from_millis(5);

/// A connection into the guest, which is on its way: whoever gets it waits until it stands. The monitor is in the gateway's
/// namespace, so the guest is its neighbour.
pub(super) fn begin_dial(port: u16) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    set_up(&socket, port)?;
    match connect(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(GUEST_V4, port))) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// A connection to the agent.
fn dial(within: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from((GUEST_V4, AGENT_PORT)), within)?;
    set_up(&stream, AGENT_PORT)?;
    Ok(stream)
}

/// A connection to the agent ends with a reset, whoever closes it first: an end that waited for stray packets would keep
/// the guest from being saved for a minute. Nothing is lost, since nobody hangs up on an agent whose answer counts.
fn set_up(socket: &impl AsFd, port: u16) -> io::Result<()> {
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    if port == AGENT_PORT {
        setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    }
    Ok(())
}

/// The agent's shutdown request. Its answer comes when every process is gone.
pub(super) fn shut_down(vm: &Vm, grace: Duration, within: Duration) -> io::Result<()> {
    let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
    match ask(&vm.launch.token, Op::Shutdown(Shutdown { grace_ms }), within)? {
        Answer::Done => Ok(()),
        Answer::Failed(failed) => Err(io::Error::other(failed.message)),
    }
}

/// Who the guest is in this run.
pub(super) fn identity(vm: &Vm) -> Boot {
    let spec = &vm.launch.spec;
    let mut addresses = vec![network::GUEST_V4.to_string()];
    if vm.ipv6 {
        addresses.push(network::GUEST_V6.to_owned());
    }
    Boot {
        token: vm.launch.token.clone(),
        hostname: spec.id.as_str().to_owned(),
        addresses,
        resolvers: vm.uplink().map(|_| network::GATEWAY_V4.to_string()).into_iter().collect(),
        cpus: spec.size.cpus,
        max_pids: limits::GUEST_PIDS,
        link: vm.launch.machine.as_ref().map(|_| link(vm.ipv6)),
    }
}

/// Who the guest is told to be as it boots: of one that a template is made of, nobody.
pub(super) fn first_identity(vm: &Vm) -> Boot {
    let own = identity(vm);
    match &vm.launch.template {
        None => own,
        Some(template) => Boot { token: template.token.clone(), hostname: NOBODY.into(), resolvers: Vec::new(), ..own },
    }
}

/// How a guest with a kernel of its own sets up its way to the gateway.
fn link(ipv6: bool) -> Link {
    Link {
        address: GUEST_V4,
        prefix: network::PREFIX_V4,
        gateway: network::GATEWAY_V4,
        v6: match (network::GUEST_V6.parse(), network::GATEWAY_V6.parse()) {
            (Ok(guest), Ok(gateway)) if ipv6 => Some((guest, network::PREFIX_V6, gateway)),
            _ => None,
        },
    }
}

/// Makes a guest that was saved under `old_token` this VM: asks until the agent is there and has answered.
pub(super) fn become_this(vm: &Vm, old_token: &str, deadline: Instant) -> io::Result<()> {
    let machine_id = hex::encode(rand::random::<[u8; 16]>());
    let (mut token, mut patience) = (old_token, FIRST_DIAL);
    loop {
        // Made anew each time: it tells the time.
        let renewal = || Op::Renew(renewal(vm, Some(machine_id.clone())));
        let asked = dial(patience).and_then(|agent| ask_by(agent, token, renewal(), ANSWER));
        patience = (patience * 2).min(DIAL_TIMEOUT);
        match asked {
            Ok(Answer::Done) => return Ok(()),
            // An earlier request was done, and only its answer lost.
            Ok(Answer::Failed(failed)) if failed.code == FailureCode::Unauthorized && token == old_token => {
                token = &vm.launch.token;
            }
            Ok(Answer::Failed(failed)) => return Err(io::Error::other(failed.message)),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

/// Starts the program, unless it runs already.
pub(super) fn start_program(vm: &Vm, program: &Program) -> io::Result<Answer> {
    let Program { argv, env, cwd, user, stop_signal } = program.clone();
    let program = tiffin_protocol::Program { argv, env, cwd, user, stop_signal: stop_signal.number() };
    ask(&vm.launch.token, Op::Program(program), START_PROGRAM)
}

/// Whether the guest runs: one that stands still doesn't answer.
pub(super) fn answers(vm: &Vm) -> bool {
    ask(&vm.launch.token, Op::Ping, ANSWER).is_ok()
}

/// Tells the guest what has changed of its network.
pub(super) fn tell_network(vm: &Vm) -> io::Result<()> {
    match ask(&vm.launch.token, Op::Renew(renewal(vm, None)), ANSWER)? {
        Answer::Done => Ok(()),
        Answer::Failed(failed) => Err(io::Error::other(failed.message)),
    }
}

fn renewal(vm: &Vm, machine_id: Option<String>) -> Renew {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Renew {
        boot: identity(vm),
        machine_id,
        unix_ms: i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
        seed: hex::encode(rand::random::<[u8; 32]>()),
    }
}

/// The agent's last frame.
pub(super) enum Answer {
    Done,
    Failed(Failure),
}

fn ask(token: &str, op: Op, within: Duration) -> io::Result<Answer> {
    ask_by(dial(DIAL_TIMEOUT)?, token, op, within)
}

fn ask_by(mut agent: TcpStream, token: &str, op: Op, within: Duration) -> io::Result<Answer> {
    agent.set_read_timeout(Some(within))?;
    agent.set_write_timeout(Some(ANSWER))?;
    let request = Request { token: token.to_owned(), op };
    let request = serde_json::to_vec(&request).map_err(io::Error::other)?;
    if request.len() >= MAX_FRAME {
        return Err(io::Error::other("the request is too large"));
    }
    agent.write_all(&encode(Kind::Request, &request))?;
    let mut header = [0; HEADER];
    agent.read_exact(&mut header)?;
    let length = decode_header(header).map_err(io::Error::other)?;
    if length > MAX_ANSWER {
        return Err(io::Error::other(format!("an answer of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    agent.read_exact(&mut bytes)?;
    match Kind::from_byte(bytes[0]).map_err(io::Error::other)? {
        Kind::Done => Ok(Answer::Done),
        Kind::Failed => serde_json::from_slice(&bytes[1..]).map(Answer::Failed).map_err(io::Error::other),
        other => Err(io::Error::other(format!("the agent answered with a {other:?} frame"))),
    }
}
