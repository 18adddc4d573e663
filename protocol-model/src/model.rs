//! The protocol as a model: which steps are possible in a state, and what each does.
//!
//! What makes it small without making it blind:
//! - A transaction is one step. A process that dies before the commit has done nothing.
//! - Timers may fire at any moment, so no clock is needed. `reconciliation.lost_at` only makes an order due earlier, and
//!   is modelled where a broken design has nothing else.
//! - A message that was ever published may come once more at any time. This covers redelivery, replays, consumers made
//!   anew, and a broker rolled back to an older copy.
//! - The broker may or may not recognise an id that it had: its memory has a window, which is always in the wrong
//!   place. With [`Window::Endless`] it never forgets.
//! - Relays do not exclude each other here. The row locks only save work.

use stateright::{Model, Property};

use crate::action::{Action, Place};
use crate::design::{Design, Guard, Window};
use crate::properties;
use crate::state::{
    BALANCE_ZERO, Hand, ORDERS_MAX, Order, Relay, State, TWINS_MAX, Way, client, decision, status,
};

/// Highest number of a message.
const N_MAX: u8 = 3;

const IDLE: u8 = 0;
const TAKEN: u8 = 1;
const PUBACK_CAME: u8 = 2;
const FETCHED: u8 = 1;
const HALFWAY: u8 = 2;
const COMMITTED: u8 = 3;

/// How much of everything there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Orders, all of one account and one price.
    pub orders: usize,
    /// Relays of each service.
    pub relays: usize,
    /// Consumers in payments.
    pub workers: usize,
    /// How often the broker may lose something.
    pub losses: u8,
    /// How often an order may be asked for again although nothing was lost.
    pub slow: u8,
    /// Money at the beginning, in prices.
    pub money: u8,
    /// Whether there is a deposit of one price at some time.
    pub deposit: bool,
    /// How long the broker recognises ids.
    pub window: Window,
    /// What is built, or broken.
    pub design: Design,
}

fn bit(n: u8) -> u8 {
    1 << n
}

fn numbers(set: u8) -> impl Iterator<Item = u8> {
    (0..=N_MAX).filter(move |n| set & bit(*n) != 0)
}

fn index(way: Way) -> usize {
    match way {
        Way::Requests => 0,
        Way::Answers => 1,
    }
}

impl Protocol {
    fn hands(&self, way: Way) -> usize {
        match way {
            Way::Requests => self.workers,
            Way::Answers => 1,
        }
    }

    fn is(&self, guard: Guard) -> bool {
        self.design.has(guard)
    }

    /// The id under which message n is published.
    fn message_id(&self, n: u8) -> u8 {
        if self.is(Guard::FreshMessageId) { n } else { 0 }
    }

    /// Whether something about the order is still on its way, so that asking again is only impatience.
    fn is_under_way(&self, state: &State, order: usize) -> bool {
        let row = state.orders[order];
        let of_order = |relay: &Relay| relay.phase() != IDLE && usize::from(relay.order()) == order;
        Way::BOTH
            .iter()
            .any(|way| row.waiting(*way) != 0 || row.ready(*way) != 0)
            || state.relays.iter().flatten().any(of_order)
            || state
                .hands
                .iter()
                .flatten()
                .any(|hand| hand.held(order) != 0)
    }

    fn client_actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (order, row) in state.orders[..self.orders].iter().enumerate() {
            if row.client() != client::ANSWERED {
                actions.push(Action::Place {
                    order,
                    answered: true,
                });
                actions.push(Action::Place {
                    order,
                    answered: false,
                });
            }
            if !self.is(Guard::CommitFirst)
                && row.client() == client::SILENT
                && row.requests_said() == 0
            {
                actions.push(Action::PublishBeside { order });
            }
        }
        if self.deposit && state.shared.deposit_client() != client::ANSWERED {
            actions.push(Action::Deposit { answered: true });
            actions.push(Action::Deposit { answered: false });
        }
    }

    fn relay_actions(&self, state: &State, way: Way, actions: &mut Vec<Action>) {
        let relays = &state.relays[index(way)];
        if relays.iter().filter(|relay| relay.phase() != IDLE).count() < self.relays {
            // Idle ones stand first.
            for (order, row) in state.orders[..self.orders].iter().enumerate() {
                actions.extend(numbers(row.waiting(way)).map(|n| Action::Take {
                    way,
                    relay: 0,
                    order,
                    n,
                }));
            }
        }
        for (twin, relay) in distinct(relays) {
            match relay.phase() {
                TAKEN => {
                    let said = state.orders[usize::from(relay.order())].said(way)
                        & bit(self.message_id(relay.n()))
                        != 0;
                    if !(said && self.window == Window::Endless) {
                        actions.push(Action::Send {
                            way,
                            relay: twin,
                            stored: true,
                        });
                    }
                    if said {
                        actions.push(Action::Send {
                            way,
                            relay: twin,
                            stored: false,
                        });
                    }
                    actions.push(Action::Die {
                        place: Place::RowTaken,
                        way,
                        twin,
                    });
                }
                PUBACK_CAME => {
                    actions.push(Action::Mark { way, relay: twin });
                    actions.push(Action::Die {
                        place: Place::PubAckCame,
                        way,
                        twin,
                    });
                }
                _ => {}
            }
        }
    }

    fn consumer_actions(&self, state: &State, way: Way, actions: &mut Vec<Action>) {
        let hands = &state.hands[index(way)];
        if hands.iter().filter(|hand| hand.phase() != IDLE).count() < self.hands(way) {
            let mut ready = 0;
            for (order, row) in state.orders[..self.orders].iter().enumerate() {
                ready += row.ready(way).count_ones();
                actions.extend(numbers(row.ready(way)).map(|n| Action::Fetch {
                    way,
                    hand: 0,
                    order,
                    n,
                }));
            }
            if ready > 1 {
                actions.push(Action::FetchAll { way, hand: 0 });
            }
        }
        for (twin, hand) in distinct(hands) {
            match hand.phase() {
                FETCHED => {
                    let in_halves = way == Way::Requests
                        && (!self.is(Guard::AccountLock) || !self.is(Guard::OneTransaction));
                    actions.push(if in_halves {
                        Action::Halfway { hand: twin }
                    } else {
                        Action::Apply { way, hand: twin }
                    });
                    actions.push(Action::Die {
                        place: Place::BatchFetched,
                        way,
                        twin,
                    });
                }
                HALFWAY => {
                    actions.push(Action::Apply { way, hand: twin });
                    actions.push(Action::Die {
                        place: Place::BatchFetched,
                        way,
                        twin,
                    });
                }
                COMMITTED => {
                    actions.push(Action::Ack { way, hand: twin });
                    actions.push(Action::Die {
                        place: Place::BatchCommitted,
                        way,
                        twin,
                    });
                }
                _ => {}
            }
        }
    }

    fn healing_actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (order, row) in state.orders[..self.orders].iter().enumerate() {
            let published = row.requests_waiting() & bit(row.asks()) == 0;
            let due = row.due() == 1 || self.is(Guard::Timer);
            let another = row.asks() < if self.is(Guard::ForEver) { N_MAX } else { 1 };
            if self.is(Guard::Reconciler)
                && row.status() == status::NEW
                && published
                && due
                && another
            {
                if !self.is_under_way(state, order) {
                    actions.push(Action::AskAgain { order, slow: false });
                } else if state.shared.slow_left() > 0 {
                    actions.push(Action::AskAgain { order, slow: true });
                }
            }
        }
        if state.shared.unnoticed() == 1 {
            actions.push(Action::NoteLoss);
        }
    }

    fn faults(&self, state: &State, actions: &mut Vec<Action>) {
        let may_lose = state.shared.losses_left() > 0;
        if may_lose {
            actions.push(Action::Wipe);
        }
        for (order, row) in state.orders[..self.orders].iter().enumerate() {
            for way in Way::BOTH {
                if may_lose {
                    actions.extend(numbers(row.ready(way)).map(|n| Action::Lose { way, order, n }));
                }
                actions.extend(
                    numbers(row.said(way) & !row.ready(way)).map(|n| Action::Replay {
                        way,
                        order,
                        n,
                    }),
                );
            }
            let knows = match self.design.broken {
                Some(Guard::DecisionDecides) => row.inbox() == 1,
                Some(Guard::DecisionForEver) => row.decision() != decision::NONE,
                _ => false,
            };
            if knows {
                actions.push(Action::Prune { order });
            }
            if !self.is(Guard::OnlyPaymentsDecides) && row.status() == status::NEW {
                actions.push(Action::TimeOut { order });
            }
        }
    }

    /// One transaction of payments.
    fn charge(&self, state: &mut State, hand: Hand) {
        for order in 0..self.orders {
            let held = hand.held(order);
            let Some(ask) = numbers(held).last() else {
                continue;
            };
            let row = &mut state.orders[order];
            let decided = match self.design.broken {
                Some(Guard::Decision) => false,
                Some(Guard::DecisionDecides) => row.inbox() == 1,
                Some(Guard::RefusalStored) => row.decision() == decision::PAID,
                _ => row.decision() != decision::NONE,
            };
            if decided {
                if ask > row.last_ask() && self.is(Guard::ReArm) {
                    row.set_last_ask(ask);
                    row.set_answers_waiting(row.answers_waiting() | bit(ask));
                }
                continue;
            }
            let enough = state.shared.balance() > BALANCE_ZERO;
            let noted = hand.phase() == HALFWAY && hand.noted() & bit(order as u8) != 0;
            let paid = match self.design.broken {
                Some(Guard::AccountLock) | Some(Guard::OneTransaction) => noted,
                _ => enough,
            };
            if paid {
                // A batch without de-duplication decides each of its messages as if it were alone.
                let times = if self.is(Guard::BatchDistinct) {
                    1
                } else {
                    held.count_ones() as u8
                };
                if self.is(Guard::OneTransaction) {
                    state
                        .shared
                        .set_balance(state.shared.balance().saturating_sub(times));
                    row.set_debits((row.debits() + times).min(3));
                }
                row.set_decision(decision::PAID);
            } else {
                row.set_decision(decision::DECLINED);
            }
            if self.design.broken == Some(Guard::DecisionDecides) {
                row.set_inbox(1);
            }
            row.set_last_ask(ask);
            row.set_answers_waiting(row.answers_waiting() | bit(0));
        }
    }

    /// What a broken design does before the transaction of [`Self::charge`].
    fn halfway(&self, state: &mut State, hand: usize) {
        let mut held = state.hands[0][hand];
        let mut noted = 0;
        for order in (0..self.orders).filter(|order| held.held(*order) != 0) {
            let row = &mut state.orders[order];
            if row.decision() == decision::NONE && state.shared.balance() > BALANCE_ZERO {
                noted |= bit(order as u8);
                if !self.is(Guard::OneTransaction) {
                    state.shared.set_balance(state.shared.balance() - 1);
                    row.set_debits((row.debits() + 1).min(3));
                }
            }
        }
        held.set_noted(noted);
        held.set_phase(HALFWAY);
        state.hands[0][hand] = held;
    }

    /// One transaction of orders.
    fn settle(&self, state: &mut State, hand: Hand) {
        for order in (0..self.orders).filter(|order| hand.held(*order) != 0) {
            let row = &mut state.orders[order];
            if row.status() == status::NEW || !self.is(Guard::StatusGuard) {
                row.set_status(if row.decision() == decision::PAID {
                    status::FINISHED
                } else {
                    status::CANCELLED
                });
                row.set_told((row.told() + 1).min(3));
                row.set_due(0);
            }
        }
    }

    fn place(&self, row: &mut Order, answered: bool) {
        if row.status() == status::ABSENT || !self.is(Guard::OrderKey) {
            row.set_made((row.made() + 1).min(3));
            if row.status() == status::ABSENT {
                row.set_status(status::NEW);
            }
            match self.design.broken {
                // Who dies before the answer has not published either.
                Some(Guard::Outbox) if answered => Self::store(row, Way::Requests, 0, 0),
                Some(Guard::Outbox | Guard::CommitFirst) => {}
                _ => row.set_requests_waiting(row.requests_waiting() | bit(0)),
            }
        }
        row.set_client(if answered {
            client::ANSWERED
        } else {
            client::UNSURE
        });
    }

    fn forget_relay(state: &mut State, way: Way, relay: usize) -> Relay {
        std::mem::take(&mut state.relays[index(way)][relay])
    }

    fn store(row: &mut Order, way: Way, id: u8, n: u8) {
        row.set_said(way, row.said(way) | bit(id));
        row.set_ready(way, row.ready(way) | bit(n));
    }

    fn apply_action(&self, state: &mut State, action: Action) {
        match action {
            Action::Place { order, answered } => self.place(&mut state.orders[order], answered),
            Action::Deposit { answered } => {
                let shared = &mut state.shared;
                let times = if self.is(Guard::DepositKey) { 1 } else { 2 };
                if shared.deposited() < times {
                    shared.set_deposited(shared.deposited() + 1);
                    shared.set_balance(shared.balance() + 1);
                }
                shared.set_deposit_client(if answered {
                    client::ANSWERED
                } else {
                    client::UNSURE
                });
            }
            Action::Take {
                way,
                relay,
                order,
                n,
            } => {
                let taken = &mut state.relays[index(way)][relay];
                taken.set_phase(TAKEN);
                taken.set_order(order as u8);
                taken.set_n(n);
                if !self.is(Guard::PubAckFirst) {
                    let row = &mut state.orders[order];
                    row.set_waiting(way, row.waiting(way) & !bit(n));
                }
            }
            Action::Send { way, relay, stored } => {
                let taken = &mut state.relays[index(way)][relay];
                taken.set_phase(PUBACK_CAME);
                let (order, n) = (usize::from(taken.order()), taken.n());
                if stored {
                    Self::store(&mut state.orders[order], way, self.message_id(n), n);
                }
            }
            Action::Mark { way, relay } => {
                let taken = Self::forget_relay(state, way, relay);
                let row = &mut state.orders[usize::from(taken.order())];
                row.set_waiting(way, row.waiting(way) & !bit(taken.n()));
            }
            Action::Fetch {
                way,
                hand,
                order,
                n,
            } => {
                state.hands[index(way)][hand].hold(order, bit(n));
                self.fetched(state, way, hand);
            }
            Action::FetchAll { way, hand } => {
                for order in 0..self.orders {
                    let ready = state.orders[order].ready(way);
                    state.hands[index(way)][hand].hold(order, ready);
                }
                self.fetched(state, way, hand);
            }
            Action::Apply { way, hand } => {
                let held = state.hands[index(way)][hand];
                match way {
                    Way::Requests => self.charge(state, held),
                    Way::Answers => self.settle(state, held),
                }
                let held = &mut state.hands[index(way)][hand];
                held.set_noted(0);
                held.set_phase(COMMITTED);
            }
            Action::Ack { way, hand } => {
                let held = std::mem::take(&mut state.hands[index(way)][hand]);
                Self::acknowledge(state, way, held);
            }
            Action::AskAgain { order, slow } => {
                let row = &mut state.orders[order];
                row.set_asks(row.asks() + 1);
                row.set_due(0);
                row.set_requests_waiting(row.requests_waiting() | bit(row.asks()));
                if slow {
                    state.shared.set_slow_left(state.shared.slow_left() - 1);
                }
            }
            Action::NoteLoss => {
                for row in &mut state.orders[..self.orders] {
                    let published = row.requests_waiting() & bit(row.asks()) == 0;
                    if row.status() == status::NEW && published {
                        row.set_due(1);
                    }
                }
                state.shared.set_unnoticed(0);
            }
            Action::Die {
                place: Place::RowTaken | Place::PubAckCame,
                way,
                twin,
            } => {
                Self::forget_relay(state, way, twin);
            }
            Action::Die { way, twin, .. } => state.hands[index(way)][twin] = Hand::default(),
            Action::Lose { way, order, n } => {
                let row = &mut state.orders[order];
                row.set_ready(way, row.ready(way) & !bit(n));
                state.shared.set_losses_left(state.shared.losses_left() - 1);
            }
            Action::Wipe => {
                for row in &mut state.orders {
                    row.set_requests_ready(0);
                    row.set_answers_ready(0);
                }
                state.shared.set_losses_left(state.shared.losses_left() - 1);
                state.shared.set_unnoticed(u8::from(!self.is(Guard::Timer)));
            }
            Action::Replay { way, order, n } => {
                let row = &mut state.orders[order];
                row.set_ready(way, row.ready(way) | bit(n));
            }
            Action::PublishBeside { order } => {
                Self::store(&mut state.orders[order], Way::Requests, 0, 0)
            }
            Action::Halfway { hand } => self.halfway(state, hand),
            Action::Prune { order } => {
                let row = &mut state.orders[order];
                row.set_inbox(0);
                if !self.is(Guard::DecisionForEver) {
                    row.set_decision(decision::NONE);
                }
            }
            Action::TimeOut { order } => {
                let row = &mut state.orders[order];
                row.set_status(status::CANCELLED);
                row.set_told(row.told() + 1);
            }
        }
    }

    fn fetched(&self, state: &mut State, way: Way, hand: usize) {
        let held = &mut state.hands[index(way)][hand];
        held.set_phase(FETCHED);
        let held = *held;
        if !self.is(Guard::CommitBeforeAck) {
            Self::acknowledge(state, way, held);
        }
    }

    fn acknowledge(state: &mut State, way: Way, held: Hand) {
        for (order, row) in state.orders.iter_mut().enumerate() {
            row.set_ready(way, row.ready(way) & !held.held(order));
        }
    }
}

/// Of twins that hold the same, the first: the others would only do the same.
fn distinct<T: Copy + PartialEq>(twins: &[T; TWINS_MAX]) -> impl Iterator<Item = (usize, T)> {
    let twins = *twins;
    (0..TWINS_MAX)
        .filter(move |at| *at == 0 || twins[at - 1] != twins[*at])
        .map(move |at| (at, twins[at]))
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        assert!(
            self.orders <= ORDERS_MAX && self.relays <= TWINS_MAX && self.workers <= TWINS_MAX,
            "more than a state can hold"
        );
        assert!(
            self.losses + self.slow <= N_MAX,
            "more asks than a state can count"
        );
        let mut shared = crate::state::Shared::default();
        shared.set_balance(BALANCE_ZERO + self.money);
        shared.set_losses_left(self.losses);
        shared.set_slow_left(self.slow);
        vec![State {
            orders: [Order::default(); ORDERS_MAX],
            shared,
            relays: Default::default(),
            hands: Default::default(),
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.client_actions(state, actions);
        for way in Way::BOTH {
            self.relay_actions(state, way, actions);
            self.consumer_actions(state, way, actions);
        }
        self.healing_actions(state, actions);
        self.faults(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        self.apply_action(&mut next, action);
        next.arrange();
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all(self)
    }

    fn format_action(&self, action: &Action) -> String {
        action.to_string()
    }
}
