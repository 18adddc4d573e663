//! The model: which steps are possible in a state, and what each does.
//!
//! Simplifications that hide no behaviour:
//! - A transaction is one step. A process that crashes before the commit has had no effect.
//! - Timers may fire at any moment, so no clock is needed. `reconciliation.lost_at` only makes an
//!   order due earlier, so it is modelled only for the broken design that relies on it.
//! - Any message that was ever published may be delivered again at any time. This covers
//!   redelivery, replays, re-created consumers, and a broker rolled back to an older copy.
//! - The broker may or may not recognise an old message id, because its duplicate window may have
//!   passed. With [`Window::Endless`] it always does.
//! - Relays do not exclude each other. In the code, row locks only save work.

use crate::action::{Action, CrashPoint};
use crate::design::{Design, Guard, Window};
use crate::state::{
    BALANCE_ZERO, Channel, Consumer, ORDERS_MAX, Order, REPLICAS_MAX, Relay, State, client,
    decision, status,
};

/// Highest number of a message.
const N_MAX: u8 = 3;

const IDLE: u8 = 0;
const TAKEN: u8 = 1;
const PUBACK_RECEIVED: u8 = 2;
const FETCHED: u8 = 1;
const HALF_APPLIED: u8 = 2;
const COMMITTED: u8 = 3;

/// The bounds and the design of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Orders of one account, all with the same price.
    pub orders: usize,
    /// Relays of each service.
    pub relays: usize,
    pub payments_consumers: usize,
    /// How often the broker may lose something.
    pub losses: u8,
    /// How often an order may be re-asked although nothing was lost.
    pub slow: u8,
    /// Initial balance, in prices.
    pub money: u8,
    /// Whether one price is deposited at some time.
    pub deposit: bool,
    /// How long the broker remembers message ids.
    pub window: Window,
    pub design: Design,
}

fn bit(n: u8) -> u8 {
    1 << n
}

fn numbers(set: u8) -> impl Iterator<Item = u8> {
    (0..=N_MAX).filter(move |n| set & bit(*n) != 0)
}

fn index(channel: Channel) -> usize {
    match channel {
        Channel::Requests => 0,
        Channel::Answers => 1,
    }
}

impl Protocol {
    fn consumers(&self, channel: Channel) -> usize {
        match channel {
            Channel::Requests => self.payments_consumers,
            Channel::Answers => 1,
        }
    }

    fn has(&self, guard: Guard) -> bool {
        self.design.has(guard)
    }

    /// The id under which message n is published.
    fn message_id(&self, n: u8) -> u8 {
        if self.has(Guard::FreshMessageId) {
            n
        } else {
            0
        }
    }

    /// Whether a row or message about the order is in flight, so that a re-ask is needless.
    fn is_in_flight(&self, state: &State, order: usize) -> bool {
        let row = state.orders[order];
        let of_order = |relay: &Relay| relay.phase() != IDLE && usize::from(relay.order()) == order;
        Channel::BOTH
            .iter()
            .any(|channel| row.waiting(*channel) != 0 || row.ready(*channel) != 0)
            || state.relays.iter().flatten().any(of_order)
            || state
                .consumers
                .iter()
                .flatten()
                .any(|consumer| consumer.held(order) != 0)
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
            if !self.has(Guard::CommitFirst)
                && row.client() == client::NOT_SENT
                && row.requests_published() == 0
            {
                actions.push(Action::PublishBeforeCommit { order });
            }
        }
        if self.deposit && state.shared.deposit_client() != client::ANSWERED {
            actions.push(Action::Deposit { answered: true });
            actions.push(Action::Deposit { answered: false });
        }
    }

    fn relay_actions(&self, state: &State, channel: Channel, actions: &mut Vec<Action>) {
        let relays = &state.relays[index(channel)];
        if relays.iter().filter(|relay| relay.phase() != IDLE).count() < self.relays {
            // Replicas are sorted, so the first one is idle.
            for (order, row) in state.orders[..self.orders].iter().enumerate() {
                actions.extend(numbers(row.waiting(channel)).map(|n| Action::Take {
                    channel,
                    relay: 0,
                    order,
                    n,
                }));
            }
        }
        for (replica, relay) in distinct(relays) {
            match relay.phase() {
                TAKEN => {
                    let published = state.orders[usize::from(relay.order())].published(channel)
                        & bit(self.message_id(relay.n()))
                        != 0;
                    if !(published && self.window == Window::Endless) {
                        actions.push(Action::Send {
                            channel,
                            relay: replica,
                            stored: true,
                        });
                    }
                    if published {
                        actions.push(Action::Send {
                            channel,
                            relay: replica,
                            stored: false,
                        });
                    }
                    actions.push(Action::Die {
                        at: CrashPoint::RowTaken,
                        channel,
                        replica,
                    });
                }
                PUBACK_RECEIVED => {
                    actions.push(Action::Mark {
                        channel,
                        relay: replica,
                    });
                    actions.push(Action::Die {
                        at: CrashPoint::PubAckReceived,
                        channel,
                        replica,
                    });
                }
                _ => {}
            }
        }
    }

    fn consumer_actions(&self, state: &State, channel: Channel, actions: &mut Vec<Action>) {
        let consumers = &state.consumers[index(channel)];
        if consumers
            .iter()
            .filter(|consumer| consumer.phase() != IDLE)
            .count()
            < self.consumers(channel)
        {
            let mut ready = 0;
            for (order, row) in state.orders[..self.orders].iter().enumerate() {
                ready += row.ready(channel).count_ones();
                actions.extend(numbers(row.ready(channel)).map(|n| Action::Fetch {
                    channel,
                    consumer: 0,
                    order,
                    n,
                }));
            }
            if ready > 1 {
                actions.push(Action::FetchAll {
                    channel,
                    consumer: 0,
                });
            }
        }
        for (replica, consumer) in distinct(consumers) {
            match consumer.phase() {
                FETCHED => {
                    let in_halves = channel == Channel::Requests
                        && (!self.has(Guard::AccountLock) || !self.has(Guard::OneTransaction));
                    actions.push(if in_halves {
                        Action::ApplyHalf { consumer: replica }
                    } else {
                        Action::Apply {
                            channel,
                            consumer: replica,
                        }
                    });
                    actions.push(Action::Die {
                        at: CrashPoint::BatchFetched,
                        channel,
                        replica,
                    });
                }
                HALF_APPLIED => {
                    actions.push(Action::Apply {
                        channel,
                        consumer: replica,
                    });
                    actions.push(Action::Die {
                        at: CrashPoint::BatchFetched,
                        channel,
                        replica,
                    });
                }
                COMMITTED => {
                    actions.push(Action::Ack {
                        channel,
                        consumer: replica,
                    });
                    actions.push(Action::Die {
                        at: CrashPoint::BatchCommitted,
                        channel,
                        replica,
                    });
                }
                _ => {}
            }
        }
    }

    fn recovery_actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (order, row) in state.orders[..self.orders].iter().enumerate() {
            let published = row.requests_waiting() & bit(row.asks()) == 0;
            let due = row.due() == 1 || self.has(Guard::Timer);
            let another = row.asks()
                < if self.has(Guard::UnlimitedAsks) {
                    N_MAX
                } else {
                    1
                };
            if self.has(Guard::Reconciler)
                && row.status() == status::NEW
                && published
                && due
                && another
            {
                if !self.is_in_flight(state, order) {
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
            for channel in Channel::BOTH {
                if may_lose {
                    actions.extend(numbers(row.ready(channel)).map(|n| Action::Lose {
                        channel,
                        order,
                        n,
                    }));
                }
                actions.extend(
                    numbers(row.published(channel) & !row.ready(channel)).map(|n| Action::Replay {
                        channel,
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
            if !self.has(Guard::OnlyPaymentsDecides) && row.status() == status::NEW {
                actions.push(Action::TimeOut { order });
            }
        }
    }

    /// One transaction of payments.
    fn charge(&self, state: &mut State, consumer: Consumer) {
        for order in 0..self.orders {
            let held = consumer.held(order);
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
                if ask > row.last_ask() && self.has(Guard::ReArm) {
                    row.set_last_ask(ask);
                    row.set_answers_waiting(row.answers_waiting() | bit(ask));
                }
                continue;
            }
            let enough = state.shared.balance() > BALANCE_ZERO;
            let noted =
                consumer.phase() == HALF_APPLIED && consumer.noted() & bit(order as u8) != 0;
            let paid = match self.design.broken {
                Some(Guard::AccountLock) | Some(Guard::OneTransaction) => noted,
                _ => enough,
            };
            if paid {
                // In the design without de-duplication, each message of the batch is decided.
                let times = if self.has(Guard::BatchDistinct) {
                    1
                } else {
                    held.count_ones() as u8
                };
                if self.has(Guard::OneTransaction) {
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

    /// The first of two transactions in a broken design. [`Self::charge`] is the second one.
    fn apply_half(&self, state: &mut State, consumer: usize) {
        let mut held = state.consumers[0][consumer];
        let mut noted = 0;
        for order in (0..self.orders).filter(|order| held.held(*order) != 0) {
            let row = &mut state.orders[order];
            if row.decision() == decision::NONE && state.shared.balance() > BALANCE_ZERO {
                noted |= bit(order as u8);
                if !self.has(Guard::OneTransaction) {
                    state.shared.set_balance(state.shared.balance() - 1);
                    row.set_debits((row.debits() + 1).min(3));
                }
            }
        }
        held.set_noted(noted);
        held.set_phase(HALF_APPLIED);
        state.consumers[0][consumer] = held;
    }

    /// One transaction of orders.
    fn settle(&self, state: &mut State, consumer: Consumer) {
        for order in (0..self.orders).filter(|order| consumer.held(*order) != 0) {
            let row = &mut state.orders[order];
            if row.status() == status::NEW || !self.has(Guard::StatusGuard) {
                row.set_status(if row.decision() == decision::PAID {
                    status::FINISHED
                } else {
                    status::CANCELLED
                });
                row.set_final_events((row.final_events() + 1).min(3));
                row.set_due(0);
            }
        }
    }

    fn place(&self, row: &mut Order, answered: bool) {
        if row.status() == status::ABSENT || !self.has(Guard::OrderKey) {
            row.set_made((row.made() + 1).min(3));
            if row.status() == status::ABSENT {
                row.set_status(status::NEW);
            }
            match self.design.broken {
                // A process that crashes before it answers has not published either.
                Some(Guard::Outbox) if answered => Self::store(row, Channel::Requests, 0, 0),
                Some(Guard::Outbox | Guard::CommitFirst) => {}
                _ => row.set_requests_waiting(row.requests_waiting() | bit(0)),
            }
        }
        row.set_client(if answered {
            client::ANSWERED
        } else {
            client::UNKNOWN
        });
    }

    fn reset_relay(state: &mut State, channel: Channel, relay: usize) -> Relay {
        std::mem::take(&mut state.relays[index(channel)][relay])
    }

    fn store(row: &mut Order, channel: Channel, id: u8, n: u8) {
        row.set_published(channel, row.published(channel) | bit(id));
        row.set_ready(channel, row.ready(channel) | bit(n));
    }

    pub(crate) fn apply_action(&self, state: &mut State, action: Action) {
        match action {
            Action::Place { order, answered } => self.place(&mut state.orders[order], answered),
            Action::Deposit { answered } => {
                let shared = &mut state.shared;
                let times = if self.has(Guard::DepositKey) { 1 } else { 2 };
                if shared.deposited() < times {
                    shared.set_deposited(shared.deposited() + 1);
                    shared.set_balance(shared.balance() + 1);
                }
                shared.set_deposit_client(if answered {
                    client::ANSWERED
                } else {
                    client::UNKNOWN
                });
            }
            Action::Take {
                channel,
                relay,
                order,
                n,
            } => {
                let taken = &mut state.relays[index(channel)][relay];
                taken.set_phase(TAKEN);
                taken.set_order(order as u8);
                taken.set_n(n);
                if !self.has(Guard::PubAckFirst) {
                    let row = &mut state.orders[order];
                    row.set_waiting(channel, row.waiting(channel) & !bit(n));
                }
            }
            Action::Send {
                channel,
                relay,
                stored,
            } => {
                let taken = &mut state.relays[index(channel)][relay];
                taken.set_phase(PUBACK_RECEIVED);
                let (order, n) = (usize::from(taken.order()), taken.n());
                if stored {
                    Self::store(&mut state.orders[order], channel, self.message_id(n), n);
                }
            }
            Action::Mark { channel, relay } => {
                let taken = Self::reset_relay(state, channel, relay);
                let row = &mut state.orders[usize::from(taken.order())];
                row.set_waiting(channel, row.waiting(channel) & !bit(taken.n()));
            }
            Action::Fetch {
                channel,
                consumer,
                order,
                n,
            } => {
                state.consumers[index(channel)][consumer].hold(order, bit(n));
                self.fetched(state, channel, consumer);
            }
            Action::FetchAll { channel, consumer } => {
                for order in 0..self.orders {
                    let ready = state.orders[order].ready(channel);
                    state.consumers[index(channel)][consumer].hold(order, ready);
                }
                self.fetched(state, channel, consumer);
            }
            Action::Apply { channel, consumer } => {
                let held = state.consumers[index(channel)][consumer];
                match channel {
                    Channel::Requests => self.charge(state, held),
                    Channel::Answers => self.settle(state, held),
                }
                let held = &mut state.consumers[index(channel)][consumer];
                held.set_noted(0);
                held.set_phase(COMMITTED);
            }
            Action::Ack { channel, consumer } => {
                let held = std::mem::take(&mut state.consumers[index(channel)][consumer]);
                Self::acknowledge(state, channel, held);
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
                at: CrashPoint::RowTaken | CrashPoint::PubAckReceived,
                channel,
                replica,
            } => {
                Self::reset_relay(state, channel, replica);
            }
            Action::Die {
                channel, replica, ..
            } => state.consumers[index(channel)][replica] = Consumer::default(),
            Action::Lose { channel, order, n } => {
                let row = &mut state.orders[order];
                row.set_ready(channel, row.ready(channel) & !bit(n));
                state.shared.set_losses_left(state.shared.losses_left() - 1);
            }
            Action::Wipe => {
                for row in &mut state.orders {
                    row.set_requests_ready(0);
                    row.set_answers_ready(0);
                }
                state.shared.set_losses_left(state.shared.losses_left() - 1);
                state
                    .shared
                    .set_unnoticed(u8::from(!self.has(Guard::Timer)));
            }
            Action::Replay { channel, order, n } => {
                let row = &mut state.orders[order];
                row.set_ready(channel, row.ready(channel) | bit(n));
            }
            Action::PublishBeforeCommit { order } => {
                Self::store(&mut state.orders[order], Channel::Requests, 0, 0)
            }
            Action::ApplyHalf { consumer } => self.apply_half(state, consumer),
            Action::Prune { order } => {
                let row = &mut state.orders[order];
                row.set_inbox(0);
                if !self.has(Guard::DecisionForEver) {
                    row.set_decision(decision::NONE);
                }
            }
            Action::TimeOut { order } => {
                let row = &mut state.orders[order];
                row.set_status(status::CANCELLED);
                row.set_final_events(row.final_events() + 1);
            }
        }
    }

    fn fetched(&self, state: &mut State, channel: Channel, consumer: usize) {
        let held = &mut state.consumers[index(channel)][consumer];
        held.set_phase(FETCHED);
        let held = *held;
        if !self.has(Guard::CommitBeforeAck) {
            Self::acknowledge(state, channel, held);
        }
    }

    fn acknowledge(state: &mut State, channel: Channel, held: Consumer) {
        for (order, row) in state.orders.iter_mut().enumerate() {
            row.set_ready(channel, row.ready(channel) & !held.held(order));
        }
    }
}

/// Skips replicas in the same state as an earlier one, because they have the same actions.
fn distinct<T: Copy + PartialEq>(replicas: &[T; REPLICAS_MAX]) -> impl Iterator<Item = (usize, T)> {
    let replicas = *replicas;
    (0..REPLICAS_MAX)
        .filter(move |at| *at == 0 || replicas[at - 1] != replicas[*at])
        .map(move |at| (at, replicas[at]))
}

impl Protocol {
    pub(crate) fn initial_state(&self) -> State {
        assert!(
            self.orders <= ORDERS_MAX
                && self.relays <= REPLICAS_MAX
                && self.payments_consumers <= REPLICAS_MAX,
            "the model does not fit into a state"
        );
        assert!(
            self.losses + self.slow <= N_MAX,
            "more re-asks than a state can count"
        );
        let mut shared = crate::state::Shared::default();
        shared.set_balance(BALANCE_ZERO + self.money);
        shared.set_losses_left(self.losses);
        shared.set_slow_left(self.slow);
        State {
            orders: [Order::default(); ORDERS_MAX],
            shared,
            relays: Default::default(),
            consumers: Default::default(),
        }
    }

    pub(crate) fn possible_actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.client_actions(state, actions);
        for channel in Channel::BOTH {
            self.relay_actions(state, channel, actions);
            self.consumer_actions(state, channel, actions);
        }
        self.recovery_actions(state, actions);
        self.faults(state, actions);
    }
}
