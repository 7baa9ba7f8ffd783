//! Who converts next: one at a time, and each account in its turn, so that one with many uploads doesn't keep others waiting.
//!
//! Invariant: while somebody waits, the turn is somebody's. It goes on when it is dropped, whatever became of whoever waits. How
//! many wait is bounded by the places for uploads.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tiffin_types::id::AccountId;
use tokio::sync::oneshot;

/// Accounts that are remembered to have had a turn.
const REMEMBERED: usize = 64;

/// The one turn, and who waits for it.
#[derive(Clone, Default)]
pub(crate) struct Turns(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    busy: bool,
    waiting: VecDeque<(AccountId, oneshot::Sender<Turn>)>,
    /// Who had a turn since somebody waits, the last one last.
    served: VecDeque<AccountId>,
}

/// The right to convert, until it is dropped.
pub(crate) struct Turn(Turns);

impl Turns {
    /// Waits for the account's turn. Dropping the future gives it up.
    pub(crate) async fn take(&self, account: &AccountId) -> Turn {
        let waiting = {
            let mut state = self.lock();
            if !state.busy {
                state.begin(account.clone());
                return Turn(self.clone());
            }
            let (sender, receiver) = oneshot::channel();
            state.waiting.push_back((account.clone(), sender));
            receiver
        };
        match waiting.await {
            Ok(turn) => turn,
            // The sender is dropped only when a turn was sent.
            Err(_) => std::future::pending().await,
        }
    }

    fn pass_on(&self) {
        let next = {
            let mut state = self.lock();
            let Some(at) = state.next() else {
                (state.busy, state.served) = (false, VecDeque::new());
                return;
            };
            let Some((account, next)) = state.waiting.remove(at) else { return };
            state.begin(account);
            next
        };
        // Where nobody waits any more the turn comes back, is dropped, and so goes to the next one.
        drop(next.send(Turn(self.clone())));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin(&mut self, account: AccountId) {
        self.busy = true;
        self.served.retain(|served| *served != account);
        self.served.push_back(account);
        if self.served.len() > REMEMBERED {
            self.served.pop_front();
        }
    }

    /// Whoever's account had its last turn longest ago; of those alike, who came first.
    fn next(&self) -> Option<usize> {
        let last = |account: &AccountId| self.served.iter().position(|served| served == account).map_or(0, |at| at + 1);
        (0..self.waiting.len()).min_by_key(|at| (last(&self.waiting[*at].0), *at))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, future::BoxFuture};

    use super::*;

    fn wait(turns: &Turns, account: &AccountId) -> BoxFuture<'static, Turn> {
        let (turns, account) = (turns.clone(), account.clone());
        let mut waiting = async move { turns.take(&account).await }.boxed();
        assert!(waiting.as_mut().now_or_never().is_none(), "the turn is somebody's");
        waiting
    }

    #[tokio::test]
    async fn each_account_has_its_turn_however_many_wait_of_another() {
        let turns = Turns::default();
        let [many, few, third] = [AccountId::random(), AccountId::random(), AccountId::random()];
        let first = turns.take(&many).await;
        let order = [&many, &many, &many, &few, &few, &third];
        let mut waiting: Vec<_> = order.into_iter().enumerate().map(|(at, who)| (at, wait(&turns, who))).collect();
        let (mut turn, mut served) = (first, Vec::new());
        while !waiting.is_empty() {
            drop(turn);
            let next = waiting.iter_mut().enumerate().find_map(|(at, (_, one))| Some((at, one.now_or_never()?)));
            let (at, got) = next.expect("somebody has the turn");
            turn = got;
            served.push(waiting.remove(at).0);
        }
        assert_eq!(served, [3, 5, 0, 4, 1, 2]);
    }

    #[tokio::test]
    async fn who_gives_up_is_passed_over() {
        let turns = Turns::default();
        let account = AccountId::random();
        let turn = turns.take(&account).await;
        let (given_up, late) = (wait(&turns, &account), wait(&turns, &account));
        let mut last = wait(&turns, &account);
        drop(given_up);
        drop(turn);
        // This one was given the turn, and hangs up before it looks.
        drop(late);
        let turn = last.as_mut().now_or_never().expect("it is the last one's turn");
        drop(turn);
        assert!(turns.take(&account).now_or_never().is_some());
    }
}
