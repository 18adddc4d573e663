//! Parses as much of the PostgreSQL protocol as is needed to recognise a commit and the statements
//! before it. A statement outside a transaction block is a transaction: it is committed before the
//! server is ready for the next one.

use std::collections::HashMap;

use bytes::{Buf as _, Bytes, BytesMut};

use super::{Action, Cut, Cuts, Direction, Meter};

const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;
const HEAD: usize = 5;

#[derive(Default)]
pub(super) struct Session {
    started: bool,
    /// Expected answers to encryption requests. Each is a single byte.
    encryption_answers: usize,
    /// Prepared statements by name.
    statements: HashMap<String, String>,
    in_transaction: bool,
    /// The statements of the current or last transaction.
    transaction: String,
}

impl Session {
    /// Takes the complete messages from `from`. A matching commit cuts the connection.
    pub(super) fn pass(
        &mut self,
        direction: Direction,
        from: &mut BytesMut,
        cuts: &Cuts,
        meter: &Meter,
    ) -> Action {
        let mut passed = BytesMut::new();
        while let Some(message) = self.next(direction, from) {
            if direction == Direction::ToServer {
                meter.count(|traffic| {
                    traffic.statements +=
                        u64::from(message.starts_with(b"E") || message.starts_with(b"Q"));
                    traffic.round_trips +=
                        u64::from(message.starts_with(b"S") || message.starts_with(b"Q"));
                });
            }
            let cut = match direction {
                Direction::ToServer => self
                    .record_request(&message)
                    .then(|| cuts.take(|cut| self.matches_cut(cut, false))),
                Direction::ToClient => self
                    .confirms_commit(&message)
                    .then(|| cuts.take(|cut| self.matches_cut(cut, true))),
            };
            if cut == Some(true) {
                return Action::ForwardThenCut(passed.freeze());
            }
            passed.extend_from_slice(&message);
        }
        Action::Forward(passed.freeze())
    }

    fn matches_cut(&self, cut: &Cut, answer: bool) -> bool {
        match cut {
            Cut::CommitAnswer { after } => answer && self.transaction.contains(after),
            Cut::CommitRequest { after } => !answer && self.transaction.contains(after),
            _ => false,
        }
    }

    fn next(&mut self, direction: Direction, from: &mut BytesMut) -> Option<Bytes> {
        if direction == Direction::ToClient && self.encryption_answers > 0 {
            self.encryption_answers -= usize::from(!from.is_empty());
            return (!from.is_empty()).then(|| from.split_to(1).freeze());
        }
        // Startup messages have no type byte.
        let kind = usize::from(direction == Direction::ToClient || self.started);
        let mut length = from.get(kind..kind + 4)?;
        let end = kind + usize::try_from(length.get_u32()).ok()?;
        if from.len() < end {
            return None;
        }
        let message = from.split_to(end).freeze();
        if kind == 0 {
            match message.get(4..8).map(|mut code| code.get_u32()) {
                Some(SSL_REQUEST | GSS_REQUEST) => self.encryption_answers += 1,
                Some(CANCEL_REQUEST) => {}
                _ => self.started = true,
            }
        }
        Some(message)
    }

    /// Whether this message confirms a commit.
    fn confirms_commit(&self, message: &[u8]) -> bool {
        match message.first() {
            Some(b'C') => body(message) == b"COMMIT\0",
            Some(b'Z') => !self.in_transaction,
            _ => false,
        }
    }

    /// Records the client's statement. Returns whether the message causes a commit.
    fn record_request(&mut self, message: &[u8]) -> bool {
        let mut words = body(message)
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned());
        let mut word = || words.next().unwrap_or_default();
        match message.first() {
            Some(b'P') => {
                let (name, statement) = (word(), word());
                self.statements.insert(name, statement);
            }
            Some(b'B') => {
                let (_portal, name) = (word(), word());
                if !self.in_transaction {
                    self.transaction.clear();
                }
                if let Some(statement) = self.statements.get(&name) {
                    self.transaction.push_str(statement);
                }
            }
            Some(b'E') => return !self.in_transaction,
            Some(b'Q') => {
                let statement = word();
                match statement.trim().to_ascii_uppercase() {
                    begin if begin.starts_with("BEGIN") => {
                        self.transaction.clear();
                        self.in_transaction = true;
                    }
                    commit if commit.starts_with("COMMIT") => {
                        self.in_transaction = false;
                        return true;
                    }
                    rollback if rollback.starts_with("ROLLBACK") => {
                        self.transaction.clear();
                        self.in_transaction = false;
                    }
                    // Replaces the earlier statement: a ping must not be mistaken for it.
                    _ if !self.in_transaction => self.transaction = statement,
                    _ => self.transaction.push_str(&statement),
                }
            }
            _ => {}
        }
        false
    }
}

fn body(message: &[u8]) -> &[u8] {
    message.get(HEAD..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[kind][..], &length.to_be_bytes(), body].concat()
    }

    fn start(session: &mut Session, cuts: &Cuts) {
        let mut from = BytesMut::from(&[0, 0, 0, 8, 4, 210, 22, 47][..]);
        assert!(
            matches!(session.pass(Direction::ToServer, &mut from, cuts, &Meter::default()), Action::Forward(bytes) if bytes.len() == 8)
        );
        assert!(
            matches!(session.pass(Direction::ToClient, &mut BytesMut::from(&b"N"[..]), cuts, &Meter::default()), Action::Forward(bytes) if bytes == "N")
        );
        let mut from = BytesMut::from(&[0, 0, 0, 9, 0, 3, 0, 0, 0][..]);
        assert!(
            matches!(session.pass(Direction::ToServer, &mut from, cuts, &Meter::default()), Action::Forward(bytes) if bytes.len() == 9)
        );
    }

    #[test]
    fn a_cut_loses_only_the_answer_of_the_matching_commit() {
        let (mut session, cuts) = (Session::default(), Cuts::default());
        start(&mut session, &cuts);
        cuts.arm(
            Cut::CommitAnswer {
                after: "INSERT INTO orders",
            },
            1,
        );
        for (statement, cut) in [
            ("SELECT 1", false),
            ("INSERT INTO orders VALUES ($1)", true),
            ("INSERT INTO orders VALUES ($1)", false),
        ] {
            let asked = [
                message(b'Q', b"BEGIN\0"),
                message(b'P', format!("s1\0{statement}\0").as_bytes()),
                message(b'B', b"\0s1\0rest"),
                message(b'Q', b"COMMIT\0"),
            ]
            .concat();
            // In small chunks, as the network may deliver it.
            let mut from = BytesMut::new();
            let mut on = 0;
            for piece in asked.chunks(3) {
                from.extend_from_slice(piece);
                let Action::Forward(bytes) =
                    session.pass(Direction::ToServer, &mut from, &cuts, &Meter::default())
                else {
                    panic!("requests must be forwarded")
                };
                on += bytes.len();
            }
            assert_eq!(on, asked.len());
            let mut answer = BytesMut::from(&message(b'C', b"COMMIT\0")[..]);
            let passed = session.pass(Direction::ToClient, &mut answer, &cuts, &Meter::default());
            assert_eq!(
                matches!(passed, Action::ForwardThenCut(_)),
                cut,
                "{statement}"
            );
        }
        assert_eq!(
            (
                cuts.fired(Cut::CommitAnswer {
                    after: "INSERT INTO orders"
                }),
                cuts.armed()
            ),
            (1, 0)
        );
    }

    #[test]
    fn an_autocommit_statement_counts_as_a_transaction() {
        let (mut session, cuts) = (Session::default(), Cuts::default());
        start(&mut session, &cuts);
        let asked = [
            message(b'P', b"s1\0UPDATE outbox\0"),
            message(b'B', b"\0s1\0rest"),
            message(b'E', b"\0"),
            message(b'S', b""),
        ];
        let answer = [message(b'C', b"UPDATE 1\0"), message(b'Z', b"I")];
        let pass = |session: &mut Session, direction, messages: &[Vec<u8>]| {
            session.pass(
                direction,
                &mut BytesMut::from(&messages.concat()[..]),
                &cuts,
                &Meter::default(),
            )
        };
        cuts.arm(
            Cut::CommitAnswer {
                after: "UPDATE outbox",
            },
            1,
        );
        assert!(matches!(
            pass(&mut session, Direction::ToServer, &asked),
            Action::Forward(_)
        ));
        // CommandComplete does not confirm the commit yet; ReadyForQuery does.
        assert!(
            matches!(pass(&mut session, Direction::ToClient, &answer), Action::ForwardThenCut(bytes) if bytes == answer[0])
        );
        cuts.arm(
            Cut::CommitRequest {
                after: "UPDATE outbox",
            },
            1,
        );
        assert!(
            matches!(pass(&mut session, Direction::ToServer, &asked), Action::ForwardThenCut(bytes) if bytes == asked[..2].concat())
        );

        // Inside a transaction block the statement does not commit. A ping afterwards does not
        // count as that statement.
        cuts.arm(
            Cut::CommitRequest {
                after: "UPDATE outbox",
            },
            1,
        );
        assert!(matches!(
            pass(
                &mut session,
                Direction::ToServer,
                &[message(b'Q', b"BEGIN\0")]
            ),
            Action::Forward(_)
        ));
        assert!(matches!(
            pass(&mut session, Direction::ToServer, &asked),
            Action::Forward(_)
        ));
        assert!(matches!(
            pass(
                &mut session,
                Direction::ToServer,
                &[message(b'Q', b"ROLLBACK\0")]
            ),
            Action::Forward(_)
        ));
        assert!(matches!(
            pass(&mut session, Direction::ToClient, &answer[1..]),
            Action::Forward(_)
        ));
        assert!(matches!(
            pass(&mut session, Direction::ToServer, &[message(b'Q', b"\0")]),
            Action::Forward(_)
        ));
        assert_eq!(cuts.armed(), 1);
    }
}
