//! Parses as much of the NATS protocol as is needed to lose a single PubAck, ack or delivery.

use bytes::{Bytes, BytesMut};

use super::{Action, Cut, Cuts, Direction, Meter};

/// Takes the complete messages from `from`, and returns those that are not lost.
pub(super) fn pass(
    direction: Direction,
    from: &mut BytesMut,
    cuts: &Cuts,
    meter: &Meter,
) -> Action {
    let mut passed = BytesMut::new();
    while let Some(message) = next(from) {
        if direction == Direction::ToServer
            && (message.starts_with(b"PUB ") || message.starts_with(b"HPUB "))
        {
            meter.count(|traffic| {
                traffic.messages += 1;
                traffic.message_bytes += message.len() as u64;
            });
        }
        let meant = kind(direction, &message);
        if !meant.is_some_and(|meant| cuts.take(|cut| *cut == meant)) {
            passed.extend_from_slice(&message);
        }
    }
    Action::Forward(passed.freeze())
}

/// The cut that applies to this message, if any.
fn kind(direction: Direction, message: &[u8]) -> Option<Cut> {
    let (line, payload) = line(message)?;
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    match (direction, words.as_slice()) {
        (Direction::ToServer, ["PUB" | "HPUB", subject, ..]) if subject.starts_with("$JS.ACK.") => {
            Some(Cut::Ack)
        }
        (Direction::ToClient, ["MSG" | "HMSG", _, _, reply, _, ..])
            if reply.starts_with("$JS.ACK.") =>
        {
            Some(Cut::Delivery)
        }
        (Direction::ToClient, ["MSG", subject, ..]) if subject.starts_with("_INBOX") => {
            // Unlike a PubAck, a response of the JetStream API contains its type.
            let has = |word: &[u8]| payload.windows(word.len()).any(|found| found == word);
            (has(b"\"stream\":") && has(b"\"seq\":") && !has(b"\"type\":")).then_some(Cut::PubAck)
        }
        _ => None,
    }
}

fn next(from: &mut BytesMut) -> Option<Bytes> {
    let (words, _) = line(from)?;
    let head = words.len() + 2;
    let payload = match words.split_ascii_whitespace().next() {
        Some("MSG" | "HMSG" | "PUB" | "HPUB") => {
            words.rsplit(' ').next()?.parse::<usize>().ok()? + 2
        }
        _ => 0,
    };
    (from.len() >= head + payload).then(|| from.split_to(head + payload).freeze())
}

fn line(message: &[u8]) -> Option<(&str, &[u8])> {
    let end = message.windows(2).position(|two| two == b"\r\n")?;
    Some((
        std::str::from_utf8(&message[..end]).ok()?,
        &message[end + 2..],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_loses_only_the_matching_nats_message() {
        let cuts = Cuts::default();
        for cut in [Cut::PubAck, Cut::Ack, Cut::Delivery] {
            cuts.arm(cut, 1);
        }
        let pub_ack = "{\"stream\":\"ORDERS\",\"seq\":7}";
        let info = "{\"type\":\"io.nats.x\",\"stream\":1,\"seq\":2}";
        let answers = [
            ("INFO {\"a\":1}\r\n".to_owned(), false),
            ("PING\r\n".to_owned(), false),
            (
                format!("MSG _INBOX_orders.a.b 1 {}\r\n{info}\r\n", info.len()),
                false,
            ),
            (
                format!("MSG _INBOX_orders.a.b 1 {}\r\n{pub_ack}\r\n", pub_ack.len()),
                true,
            ),
            (
                format!("MSG _INBOX_orders.a.b 1 {}\r\n{pub_ack}\r\n", pub_ack.len()),
                false,
            ),
            (
                "HMSG _INBOX.x 2 $JS.ACK.ORDERS.c.1.1.1.1.1 4 9\r\nab\r\nx\r\nyz\r\n".to_owned(),
                true,
            ),
        ];
        let lost = |direction: Direction, messages: &[(String, bool)]| {
            let mut from = BytesMut::new();
            let mut on = Vec::new();
            for byte in messages.iter().flat_map(|(message, _)| message.bytes()) {
                from.extend_from_slice(&[byte]);
                let Action::Forward(bytes) = pass(direction, &mut from, &cuts, &Meter::default())
                else {
                    panic!("the connection must stay open")
                };
                on.extend_from_slice(&bytes);
            }
            let kept: String = messages
                .iter()
                .filter(|(_, lost)| !lost)
                .map(|(message, _)| message.as_str())
                .collect();
            assert_eq!(String::from_utf8(on).unwrap(), kept);
        };
        lost(Direction::ToClient, &answers);
        lost(
            Direction::ToServer,
            &[
                (
                    "PUB gozon.orders.placed _INBOX.x 2\r\nhi\r\n".to_owned(),
                    false,
                ),
                ("PUB $JS.ACK.ORDERS.c.1.1.1.1.1 0\r\n\r\n".to_owned(), true),
                ("PUB $JS.ACK.ORDERS.c.1.1.1.1.1 0\r\n\r\n".to_owned(), false),
            ],
        );
        assert_eq!(
            [Cut::PubAck, Cut::Ack, Cut::Delivery].map(|cut| cuts.fired(cut)),
            [1, 1, 1]
        );
    }
}
