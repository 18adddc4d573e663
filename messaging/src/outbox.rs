//! Outgoing events: stored in the transaction that makes them true, published after the commit.

pub(crate) mod hand_off;
pub(crate) mod marks;
pub(crate) mod message;
pub(crate) mod publish;
pub(crate) mod relay;
pub(crate) mod resend;
mod schedule;
pub(crate) mod stream_watch;
pub(crate) mod table;
