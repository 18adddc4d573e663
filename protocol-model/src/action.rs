//! What can happen. A step is named after the part of the code that makes it, and a death by the failpoints that lie
//! there, so that a path the model finds can be walked with the real processes.

use std::fmt;

use crate::state::Way;

/// One step of one process, one fault, or one thing that only a broken design does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// An order is placed and its transaction commits. Without the answer, the client tries again.
    Place { order: usize, answered: bool },
    /// A deposit, likewise.
    Deposit { answered: bool },
    /// A relay takes a waiting row.
    Take {
        way: Way,
        relay: usize,
        order: usize,
        n: u8,
    },
    /// A relay publishes its row, and the PubAck comes: the message is stored, or known by its id and not stored again.
    Send {
        way: Way,
        relay: usize,
        stored: bool,
    },
    /// A relay marks its row as published and commits.
    Mark { way: Way, relay: usize },
    /// A consumer is given one message.
    Fetch {
        way: Way,
        hand: usize,
        order: usize,
        n: u8,
    },
    /// A consumer is given everything that is ready, as one batch.
    FetchAll { way: Way, hand: usize },
    /// A consumer applies its batch and commits: `charge` in payments, `settle` in orders.
    Apply { way: Way, hand: usize },
    /// A consumer acknowledges its batch.
    Ack { way: Way, hand: usize },
    /// The reconciler asks again. `slow`: although nothing was lost, things only take long.
    AskAgain { order: usize, slow: bool },
    /// Relay or consumer finds that the broker came back empty.
    NoteLoss,

    /// A process dies and starts again; with its memory goes what it held.
    Die { place: Place, way: Way, twin: usize },
    /// The broker loses one message that it had acknowledged.
    Lose { way: Way, order: usize, n: u8 },
    /// The broker loses everything.
    Wipe,
    /// A message of any age is delivered once more: a replay, a copy, a consumer made anew, a broker rolled back.
    Replay { way: Way, order: usize, n: u8 },

    /// Broken: the message is published before the commit.
    PublishBeside { order: usize },
    /// Broken: half of the work is done, and the rest in a second transaction.
    Halfway { hand: usize },
    /// Broken: what decides is pruned.
    Prune { order: usize },
    /// Broken: orders cancels what takes too long.
    TimeOut { order: usize },
}

/// Where a process can die, as far as the model can tell places apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Before the order is committed: nothing has happened.
    BeforePlaced,
    /// The order is committed, its client is not answered.
    AfterPlaced,
    /// Before the deposit is committed: nothing has happened.
    BeforeDeposited,
    /// The deposit is committed, its client is not answered.
    AfterDeposited,
    /// A relay holds a row; what it published may be stored.
    RowTaken,
    /// A relay has the PubAck and has not marked the row.
    PubAckCame,
    /// A relay has marked the row: nothing is left in its memory.
    RowMarked,
    /// A consumer holds a batch, its transaction not committed.
    BatchFetched,
    /// A consumer has committed and not acknowledged.
    BatchCommitted,
    /// A consumer has acknowledged: nothing is left in its memory.
    BatchAcknowledged,
    /// The reconciler has not committed: nothing has happened.
    BeforeAsked,
    /// The reconciler has committed: nothing is left in its memory.
    AfterAsked,
}

impl Place {
    /// All.
    pub const ALL: [Self; 12] = [
        Self::BeforePlaced,
        Self::AfterPlaced,
        Self::BeforeDeposited,
        Self::AfterDeposited,
        Self::RowTaken,
        Self::PubAckCame,
        Self::RowMarked,
        Self::BatchFetched,
        Self::BatchCommitted,
        Self::BatchAcknowledged,
        Self::BeforeAsked,
        Self::AfterAsked,
    ];

    /// The failpoints of the code that lie here. A transaction that does not commit has done nothing, so all places
    /// inside one are one place.
    pub const fn failpoints(self) -> &'static [&'static str] {
        match self {
            Self::BeforePlaced => &[
                "gateway.before_forward",
                "place.before_begin",
                "place.after_orders",
                "place.before_commit",
            ],
            Self::AfterPlaced => &["place.after_commit", "gateway.after_forward"],
            Self::BeforeDeposited => &["deposit.after_add", "deposit.before_commit"],
            Self::AfterDeposited => &["deposit.after_commit"],
            Self::RowTaken => &["relay.after_take", "relay.after_send"],
            Self::PubAckCame => &["relay.after_puback", "relay.before_commit"],
            Self::RowMarked => &["relay.after_mark", "relay.after_commit"],
            Self::BatchFetched => &[
                "consumer.after_fetch",
                "consumer.after_inbox",
                "charge.after_lock",
                "charge.after_decisions",
                "charge.after_withdrawal",
                "charge.after_transfers",
                "settle.after_lock",
                "settle.after_end",
                "consumer.after_handle",
                "consumer.before_commit",
            ],
            Self::BatchCommitted => &["consumer.after_commit", "consumer.before_last_ack"],
            Self::BatchAcknowledged => &["consumer.after_ack"],
            Self::BeforeAsked => &["reconcile.after_lock", "reconcile.before_commit"],
            Self::AfterAsked => &["reconcile.after_commit"],
        }
    }
}

/// Failpoints that the model leaves out: an account is opened before the story begins, and moves no money.
pub const LEFT_OUT: [&str; 2] = ["account.before_commit", "account.after_commit"];

impl Action {
    /// Whether it is something that goes wrong, or that nobody may rely on. What is left must be enough to settle
    /// everything.
    pub fn is_fault(self) -> bool {
        match self {
            Self::Place { answered, .. } | Self::Deposit { answered } => !answered,
            Self::AskAgain { slow, .. } => slow,
            Self::Die { .. }
            | Self::Lose { .. }
            | Self::Wipe
            | Self::Replay { .. }
            | Self::Prune { .. }
            | Self::TimeOut { .. } => true,
            Self::Take { .. }
            | Self::Send { .. }
            | Self::Mark { .. }
            | Self::Fetch { .. }
            | Self::FetchAll { .. }
            | Self::Apply { .. }
            | Self::Ack { .. }
            | Self::NoteLoss
            | Self::PublishBeside { .. }
            | Self::Halfway { .. } => false,
        }
    }
}

/// The service whose process does something on this way: its relay sends, the other's consumer reads.
fn sender(way: Way) -> &'static str {
    match way {
        Way::Requests => "orders",
        Way::Answers => "payments",
    }
}

fn reader(way: Way) -> &'static str {
    match way {
        Way::Requests => "payments",
        Way::Answers => "orders",
    }
}

fn message(way: Way, order: usize, n: u8) -> String {
    let kind = match way {
        Way::Requests => "request",
        Way::Answers => "answer",
    };
    let again = if n == 0 {
        String::new()
    } else {
        format!(".r{n}")
    };
    format!("{kind}{again} of order {order}")
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Place {
                order,
                answered: true,
            } => write!(f, "place: order {order} is stored and answered"),
            Self::Place {
                order,
                answered: false,
            } => {
                write!(
                    f,
                    "place: order {order} is stored, its client learns nothing ({})",
                    Place::AfterPlaced
                )
            }
            Self::Deposit { answered: true } => write!(f, "deposit: stored and answered"),
            Self::Deposit { answered: false } => {
                write!(
                    f,
                    "deposit: stored, its client learns nothing ({})",
                    Place::AfterDeposited
                )
            }
            Self::Take { way, order, n, .. } => write!(
                f,
                "relay of {} takes {}",
                sender(way),
                message(way, order, n)
            ),
            Self::Send {
                way, stored: true, ..
            } => write!(f, "relay of {} sends, the broker stores", sender(way)),
            Self::Send {
                way, stored: false, ..
            } => write!(f, "relay of {} sends, the broker knows the id", sender(way)),
            Self::Mark { way, .. } => write!(f, "relay of {} marks its row", sender(way)),
            Self::Fetch { way, order, n, .. } => write!(
                f,
                "consumer of {} fetches {}",
                reader(way),
                message(way, order, n)
            ),
            Self::FetchAll { way, .. } => {
                write!(f, "consumer of {} fetches everything", reader(way))
            }
            Self::Apply {
                way: Way::Requests, ..
            } => write!(f, "charge: payments commits its batch"),
            Self::Apply {
                way: Way::Answers, ..
            } => write!(f, "settle: orders commits its batch"),
            Self::Ack { way, .. } => write!(f, "consumer of {} acknowledges", reader(way)),
            Self::AskAgain { order, slow: false } => {
                write!(f, "reconcile: order {order} is asked for again")
            }
            Self::AskAgain { order, slow: true } => {
                write!(f, "reconcile: order {order} is asked for again, needlessly")
            }
            Self::NoteLoss => write!(f, "reconcile: the loss is noted"),
            Self::Die { place, way, .. } => {
                let of_relay = matches!(place, Place::RowTaken | Place::PubAckCame);
                write!(
                    f,
                    "{} dies at {place}",
                    if of_relay { sender(way) } else { reader(way) }
                )
            }
            Self::Lose { way, order, n } => {
                write!(f, "the broker loses {}", message(way, order, n))
            }
            Self::Wipe => write!(f, "the broker loses everything"),
            Self::Replay { way, order, n } => {
                write!(f, "{} comes once more", message(way, order, n))
            }
            Self::PublishBeside { order } => {
                write!(f, "place: order {order} is published before it is stored")
            }
            Self::Halfway { .. } => write!(f, "charge: half of it"),
            Self::Prune { order } => write!(f, "the row that knew order {order} is pruned"),
            Self::TimeOut { order } => {
                write!(f, "orders cancels order {order}, which takes too long")
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.failpoints().join(" or "))
    }
}
