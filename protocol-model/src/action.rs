//! All actions. A step has the name of the code that performs it, and a crash has the names of the
//! failpoints at that point. So a path of the model can be replayed with real processes.

use std::fmt;

use crate::state::Channel;

/// One step of a process, a fault, or a step that only a broken design has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// An order is placed and its transaction commits. Without an answer, the client retries.
    Place { order: usize, answered: bool },
    /// A deposit commits. Without an answer, the client retries.
    Deposit { answered: bool },
    /// A relay takes an unpublished row.
    Take {
        channel: Channel,
        relay: usize,
        order: usize,
        n: u8,
    },
    /// A relay publishes its row and gets the PubAck. The broker stores the message, or drops it as
    /// a duplicate.
    Send {
        channel: Channel,
        relay: usize,
        stored: bool,
    },
    /// A relay marks its row as published and commits.
    Mark { channel: Channel, relay: usize },
    /// A consumer fetches one message.
    Fetch {
        channel: Channel,
        consumer: usize,
        order: usize,
        n: u8,
    },
    /// A consumer fetches all ready messages as one batch.
    FetchAll { channel: Channel, consumer: usize },
    /// A consumer applies its batch and commits: `charge` in payments, `settle` in orders.
    Apply { channel: Channel, consumer: usize },
    /// A consumer acknowledges its batch.
    Ack { channel: Channel, consumer: usize },
    /// The reconciler re-asks an order. With `slow`, nothing was lost; an answer only takes long.
    AskAgain { order: usize, slow: bool },
    /// A relay or consumer notices the broker loss.
    NoteLoss,

    /// A process crashes and restarts; its memory is lost.
    Die {
        at: CrashPoint,
        channel: Channel,
        replica: usize,
    },
    /// The broker loses one acknowledged message.
    Lose {
        channel: Channel,
        order: usize,
        n: u8,
    },
    /// The broker loses everything.
    Wipe,
    /// A message of any age is delivered again, for example after a stream replay, a re-created
    /// consumer or a broker rollback.
    Replay {
        channel: Channel,
        order: usize,
        n: u8,
    },

    /// Broken: the message is published before the commit.
    PublishBeforeCommit { order: usize },
    /// Broken: the work is split into two transactions. This is the first one.
    ApplyHalf { consumer: usize },
    /// Broken: the row that recognises a duplicate is pruned.
    Prune { order: usize },
    /// Broken: orders cancels an order that takes too long.
    TimeOut { order: usize },
}

/// Where a process can crash, as far as the model distinguishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CrashPoint {
    /// Before the order is committed: no effect.
    BeforePlaced,
    /// The order is committed, but its client is not answered.
    AfterPlaced,
    /// Before the deposit is committed: no effect.
    BeforeDeposited,
    /// The deposit is committed, but its client is not answered.
    AfterDeposited,
    /// A relay holds a row; its message may be stored.
    RowTaken,
    /// A relay has the PubAck but has not marked the row.
    PubAckReceived,
    /// A relay has marked the row and holds nothing.
    RowMarked,
    /// A consumer holds a batch; its transaction is not committed.
    BatchFetched,
    /// A consumer has committed but not acknowledged.
    BatchCommitted,
    /// A consumer has acknowledged and holds nothing.
    BatchAcknowledged,
    /// The reconciler has not committed: no effect.
    BeforeAsked,
    /// The reconciler has committed and holds nothing.
    AfterAsked,
}

impl CrashPoint {
    pub const ALL: [Self; 12] = [
        Self::BeforePlaced,
        Self::AfterPlaced,
        Self::BeforeDeposited,
        Self::AfterDeposited,
        Self::RowTaken,
        Self::PubAckReceived,
        Self::RowMarked,
        Self::BatchFetched,
        Self::BatchCommitted,
        Self::BatchAcknowledged,
        Self::BeforeAsked,
        Self::AfterAsked,
    ];

    /// The failpoints of the code at this point. A transaction without a commit has no effect, so
    /// all failpoints inside one transaction are one crash point.
    pub const fn failpoints(self) -> &'static [&'static str] {
        match self {
            Self::BeforePlaced => &[
                "gateway.before_forward",
                "place.before_begin",
                "place.before_commit",
            ],
            Self::AfterPlaced => &["place.after_commit", "gateway.after_forward"],
            Self::BeforeDeposited => &["deposit.after_add", "deposit.before_commit"],
            Self::AfterDeposited => &["deposit.after_commit"],
            Self::RowTaken => &["relay.after_take", "relay.after_send"],
            Self::PubAckReceived => &["relay.after_puback", "relay.before_commit"],
            Self::RowMarked => &["relay.after_mark", "relay.after_commit"],
            Self::BatchFetched => &[
                "consumer.after_fetch",
                "charge.after_lock",
                "charge.after_store",
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

/// Failpoints outside the model. The account exists from the start, and opening it moves no money.
/// A deferred message is one whose delivery takes longer: it is stored before it is acknowledged,
/// and applied by the same transaction as any other.
pub const NOT_MODELLED: [&str; 7] = [
    "account.before_commit",
    "account.after_commit",
    "defer.before_commit",
    "defer.after_commit",
    "catch_up.after_take",
    "catch_up.before_commit",
    "catch_up.after_commit",
];

impl Action {
    /// Whether the action is a fault, or one that the protocol must not rely on. All other actions
    /// together must be enough to settle every order.
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
            | Self::PublishBeforeCommit { .. }
            | Self::ApplyHalf { .. } => false,
        }
    }
}

/// The service whose relay publishes on this channel.
fn sender(channel: Channel) -> &'static str {
    match channel {
        Channel::Requests => "orders",
        Channel::Answers => "payments",
    }
}

fn reader(channel: Channel) -> &'static str {
    match channel {
        Channel::Requests => "payments",
        Channel::Answers => "orders",
    }
}

fn message(channel: Channel, order: usize, n: u8) -> String {
    let kind = match channel {
        Channel::Requests => "request",
        Channel::Answers => "answer",
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
                    "place: order {order} is stored, its client gets no answer ({})",
                    CrashPoint::AfterPlaced
                )
            }
            Self::Deposit { answered: true } => write!(f, "deposit: stored and answered"),
            Self::Deposit { answered: false } => {
                write!(
                    f,
                    "deposit: stored, its client gets no answer ({})",
                    CrashPoint::AfterDeposited
                )
            }
            Self::Take {
                channel, order, n, ..
            } => write!(
                f,
                "relay of {} takes {}",
                sender(channel),
                message(channel, order, n)
            ),
            Self::Send {
                channel,
                stored: true,
                ..
            } => write!(
                f,
                "relay of {} publishes, the broker stores",
                sender(channel)
            ),
            Self::Send {
                channel,
                stored: false,
                ..
            } => write!(
                f,
                "relay of {} publishes, the broker drops a duplicate",
                sender(channel)
            ),
            Self::Mark { channel, .. } => write!(f, "relay of {} marks its row", sender(channel)),
            Self::Fetch {
                channel, order, n, ..
            } => write!(
                f,
                "consumer of {} fetches {}",
                reader(channel),
                message(channel, order, n)
            ),
            Self::FetchAll { channel, .. } => {
                write!(f, "consumer of {} fetches all messages", reader(channel))
            }
            Self::Apply {
                channel: Channel::Requests,
                ..
            } => write!(f, "charge: payments commits its batch"),
            Self::Apply {
                channel: Channel::Answers,
                ..
            } => write!(f, "settle: orders commits its batch"),
            Self::Ack { channel, .. } => write!(f, "consumer of {} acknowledges", reader(channel)),
            Self::AskAgain { order, slow: false } => {
                write!(f, "reconcile: order {order} is re-asked")
            }
            Self::AskAgain { order, slow: true } => {
                write!(f, "reconcile: order {order} is re-asked needlessly")
            }
            Self::NoteLoss => write!(f, "reconcile: the broker loss is noted"),
            Self::Die { at, channel, .. } => {
                let of_relay = matches!(at, CrashPoint::RowTaken | CrashPoint::PubAckReceived);
                write!(
                    f,
                    "{} crashes at {at}",
                    if of_relay {
                        sender(channel)
                    } else {
                        reader(channel)
                    }
                )
            }
            Self::Lose { channel, order, n } => {
                write!(f, "the broker loses {}", message(channel, order, n))
            }
            Self::Wipe => write!(f, "the broker loses everything"),
            Self::Replay { channel, order, n } => {
                write!(f, "{} is delivered again", message(channel, order, n))
            }
            Self::PublishBeforeCommit { order } => {
                write!(f, "place: order {order} is published before it is stored")
            }
            Self::ApplyHalf { .. } => write!(f, "charge: first half"),
            Self::Prune { order } => write!(f, "the row that recognises order {order} is pruned"),
            Self::TimeOut { order } => {
                write!(f, "orders cancels order {order} because it takes too long")
            }
        }
    }
}

impl fmt::Display for CrashPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.failpoints().join(" or "))
    }
}
