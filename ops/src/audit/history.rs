//! Compares what a client was told with the databases. Everything promised exists once (I5) and
//! nothing else exists (I8). A repetition has one effect and is marked as replayed (I9). Different
//! content under a used key is refused (I10). A final order stays final (I6).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sea_orm::{DatabaseConnection, DbErr, FromQueryResult};
use serde_json::Value;

use super::{Databases, FindingKind, Report, rows};
use crate::history::{Exchange, History};

const USERS_PER_QUERY: usize = 500;

/// What a request creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Resource {
    Account,
    Deposit,
    Order,
}

impl Resource {
    const fn name(self) -> &'static str {
        match self {
            Self::Account => "account",
            Self::Deposit => "deposit",
            Self::Order => "order",
        }
    }
}

/// Two requests with one key are the same request if these fields are equal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Content {
    amount: i64,
    description: String,
}

/// The outcome that the answer to an attempt reports.
enum Outcome {
    /// 2xx.
    Done { id: String },
    /// 4xx: not done.
    Refused { code: String },
    /// 5xx with a known outcome: not done.
    Denied,
    /// No answer, a 5xx with outcome `unknown`, or a 409 because a concurrent request is running.
    Unknown,
}

struct Attempt<'a> {
    exchange: &'a Exchange,
    content: Option<Content>,
    outcome: Outcome,
}

impl Attempt<'_> {
    fn done(&self) -> Option<&str> {
        if let Outcome::Done { id } = &self.outcome {
            Some(id)
        } else {
            None
        }
    }

    /// Whether this attempt may have created a row with this content without saying so.
    fn may_have_done(&self, content: &Content) -> bool {
        matches!(self.outcome, Outcome::Unknown) && self.content.as_ref() == Some(content)
    }
}

/// Resource, user and idempotency key. Requests without a key are checked separately.
type Intent = (Resource, String, String);

#[derive(Clone, Debug, FromQueryResult)]
struct StoredRow {
    user_id: String,
    key: String,
    id: String,
    amount: i64,
    description: String,
    status: String,
}

impl StoredRow {
    fn content(&self) -> Content {
        Content {
            amount: self.amount,
            description: self.description.clone(),
        }
    }
}

const ROWS: [(Resource, &str); 3] = [
    (
        Resource::Order,
        "SELECT user_id, idempotency_key AS key, id::text AS id, amount, description, status FROM orders WHERE user_id = ANY($1::text[])",
    ),
    (
        Resource::Deposit,
        "SELECT user_id, coalesce(idempotency_key, '') AS key, id::text AS id, amount, '' AS description, '' AS status
         FROM transfers WHERE kind = 'deposit' AND user_id = ANY($1::text[])",
    ),
    (
        Resource::Account,
        "SELECT user_id, idempotency_key AS key, user_id AS id, 0::bigint AS amount, '' AS description, '' AS status
         FROM accounts WHERE user_id = ANY($1::text[])",
    ),
];

pub(super) async fn check(
    databases: &Databases,
    history: &History,
    report: &mut Report,
) -> Result<(), DbErr> {
    report.exchanges = history.exchanges.len() as u64;
    let mut keyed: BTreeMap<Intent, Vec<Attempt<'_>>> = BTreeMap::new();
    let mut unkeyed: BTreeMap<(Resource, String), Vec<Attempt<'_>>> = BTreeMap::new();
    for exchange in &history.exchanges {
        let Some((resource, user, one)) = intent(exchange) else {
            continue;
        };
        match &exchange.key {
            Some(key) => keyed
                .entry((resource, user, key.clone()))
                .or_default()
                .push(one),
            None => unkeyed.entry((resource, user)).or_default().push(one),
        }
    }
    let users: BTreeSet<&String> = keyed
        .keys()
        .map(|(_, user, _)| user)
        .chain(unkeyed.keys().map(|(_, user)| user))
        .collect();
    let mut stored: BTreeMap<Intent, Vec<StoredRow>> = BTreeMap::new();
    let users: Vec<String> = users.into_iter().cloned().collect();
    for (resource, query) in ROWS {
        let db: &DatabaseConnection = if resource == Resource::Order {
            &databases.orders
        } else {
            &databases.payments
        };
        for some in users.chunks(USERS_PER_QUERY) {
            for row in rows::<StoredRow>(db, query, vec![some.to_vec().into()]).await? {
                stored
                    .entry((resource, row.user_id.clone(), row.key.clone()))
                    .or_default()
                    .push(row);
            }
        }
    }

    for (intent, attempts) in &mut keyed {
        attempts.sort_by_key(|one| (one.exchange.begun_us, one.exchange.ended_us));
        check_intent(
            intent,
            attempts,
            stored.get(intent).map_or(&[], Vec::as_slice),
            report,
        );
    }
    check_without_keys(&unkeyed, &keyed, &stored, report);
    check_reads(history, &keyed, &stored, report);
    Ok(())
}

/// Compares all attempts under one key with the rows that have this key.
fn check_intent(
    (resource, user, key): &Intent,
    attempts: &[Attempt<'_>],
    rows: &[StoredRow],
    report: &mut Report,
) {
    let name = format!("{user} {key}");
    let resource = resource.name();
    if rows.len() > 1 {
        report.add(
            FindingKind::DoubledKey,
            &name,
            format!("{} {resource}s under one key", rows.len()),
        );
    }
    let done: Vec<(&Attempt<'_>, &str)> = attempts
        .iter()
        .filter_map(|one| Some((one, one.done()?)))
        .collect();
    let contents: BTreeSet<&Content> = done
        .iter()
        .filter_map(|(one, _)| one.content.as_ref())
        .collect();
    if contents.len() > 1 {
        report.add(
            FindingKind::OtherContentApplied,
            &name,
            format!(
                "{} different contents were answered with 2xx: {contents:?}",
                contents.len()
            ),
        );
    }
    let answers: BTreeSet<&str> = done
        .iter()
        .map(|(one, _)| one.exchange.answer.as_str())
        .collect();
    if answers.len() > 1 {
        report.add(
            FindingKind::AnswersDiffer,
            &name,
            format!(
                "{} different answers to one key: {answers:?}",
                answers.len()
            ),
        );
    }
    check_refusals(&name, attempts, &done, rows, report);
    let Some((first_done, id)) = done.first() else {
        // No answer confirms it. A row is legal only if an attempt with its content is unknown.
        if let Some(row) = rows.first()
            && !attempts.iter().any(|one| one.may_have_done(&row.content()))
        {
            if attempts
                .iter()
                .any(|one| matches!(one.outcome, Outcome::Unknown))
            {
                report.add(
                    FindingKind::Unexpected,
                    &row.id,
                    format!("{resource} of {name} has content that no request had"),
                );
            } else {
                report.add(
                    FindingKind::DeniedButDone,
                    &row.id,
                    format!(
                        "{resource} of {name} is stored, but every answer says it was not done"
                    ),
                );
            }
        }
        return;
    };
    match rows.first() {
        None => report.add(
            FindingKind::Lost,
            id,
            format!(
                "{resource} of {name} was answered with {:?}, but is not stored",
                first_done.exchange.status
            ),
        ),
        Some(row)
            if row.id != *id
                || first_done
                    .content
                    .as_ref()
                    .is_some_and(|content| *content != row.content()) =>
        {
            let words = format!(
                "{resource} of {name}: answered {id}, {:?}; stored {}, {:?}",
                first_done.content,
                row.id,
                row.content()
            );
            report.add(FindingKind::Divergent, id, words);
        }
        Some(_) => {}
    }
    let first_times: Vec<&&Attempt<'_>> = done
        .iter()
        .map(|(one, _)| one)
        .filter(|one| !one.exchange.replayed)
        .collect();
    match first_times.as_slice() {
        [] => {
            // All answers are marked as replayed, so an earlier attempt must have done it. The
            // outcome of that attempt must be unknown.
            let first_answer = done
                .iter()
                .map(|(one, _)| one.exchange.ended_us)
                .min()
                .unwrap_or_default();
            let content = first_done.content.clone().unwrap_or_else(|| Content {
                amount: 0,
                description: String::new(),
            });
            if !attempts
                .iter()
                .any(|one| one.may_have_done(&content) && one.exchange.begun_us < first_answer)
            {
                report.add(
                    FindingKind::DeniedButDone,
                    &name,
                    format!("the {resource} was done by an attempt whose answer denies it"),
                );
            }
        }
        [one] => {
            let before = done
                .iter()
                .any(|(other, _)| other.exchange.ended_us < one.exchange.begun_us);
            if before {
                report.add(
                    FindingKind::DoubledKey,
                    &name,
                    format!("the {resource} was done again after an answer that it was done"),
                );
            }
        }
        several => {
            report.add(
                FindingKind::DoubledKey,
                &name,
                format!(
                    "{} answers to the {resource} are not marked as replayed",
                    several.len()
                ),
            );
        }
    }
}

/// Different content under a key must be refused; the same content must not.
fn check_refusals(
    name: &str,
    attempts: &[Attempt<'_>],
    done: &[(&Attempt<'_>, &str)],
    rows: &[StoredRow],
    report: &mut Report,
) {
    for one in attempts {
        let (Outcome::Refused { code }, Some(content)) = (&one.outcome, &one.content) else {
            continue;
        };
        if code != "idempotency_key_reused" {
            continue;
        }
        let another = attempts.iter().any(|other| {
            other.exchange.begun_us < one.exchange.ended_us
                && other.content.as_ref() != Some(content)
                && matches!(other.outcome, Outcome::Done { .. } | Outcome::Unknown)
        });
        if !another
            || done
                .iter()
                .any(|(other, _)| other.content.as_ref() == Some(content))
        {
            report.add(
                FindingKind::RepetitionRefused,
                name,
                format!("{content:?} was refused as different content, but was the same"),
            );
        } else if rows.iter().any(|row| row.content() == *content) {
            report.add(
                FindingKind::OtherContentApplied,
                name,
                format!("{content:?} was refused as different content, but is stored"),
            );
        }
    }
}

/// Checks requests without a key, and rows whose key is not in the history.
fn check_without_keys(
    unkeyed: &BTreeMap<(Resource, String), Vec<Attempt<'_>>>,
    keyed: &BTreeMap<Intent, Vec<Attempt<'_>>>,
    stored: &BTreeMap<Intent, Vec<StoredRow>>,
    report: &mut Report,
) {
    let mut unexplained: BTreeMap<(Resource, String), Vec<&StoredRow>> = BTreeMap::new();
    for (intent, rows) in stored
        .iter()
        .filter(|(intent, _)| !keyed.contains_key(*intent))
    {
        unexplained
            .entry((intent.0, intent.1.clone()))
            .or_default()
            .extend(rows);
    }
    for ((resource, user), attempts) in unkeyed {
        let rows = unexplained.entry((*resource, user.clone())).or_default();
        for (one, id) in attempts.iter().filter_map(|one| Some((one, one.done()?))) {
            match rows.iter().position(|row| row.id == id) {
                None => report.add(
                    FindingKind::Lost,
                    id,
                    format!(
                        "{} of {user} was answered with {:?}, but is not stored",
                        resource.name(),
                        one.exchange.status
                    ),
                ),
                Some(index) => {
                    let row = rows.swap_remove(index);
                    if one
                        .content
                        .as_ref()
                        .is_some_and(|content| *content != row.content())
                    {
                        report.add(
                            FindingKind::Divergent,
                            id,
                            format!("requested {:?}, stored {:?}", one.content, row.content()),
                        );
                    }
                }
            }
        }
        for one in attempts
            .iter()
            .filter(|one| matches!(one.outcome, Outcome::Unknown))
        {
            if let Some(index) = rows
                .iter()
                .position(|row| one.may_have_done(&row.content()))
            {
                rows.swap_remove(index);
            }
        }
    }
    for ((resource, user), rows) in unexplained {
        for row in rows {
            report.add(
                FindingKind::Unexpected,
                &row.id,
                format!(
                    "{} of {user} under key {}, which no request had",
                    resource.name(),
                    row.key
                ),
            );
        }
    }
}

/// Checks the reads: a final order never changes, what was confirmed never disappears, and no
/// balance is negative.
fn check_reads(
    history: &History,
    keyed: &BTreeMap<Intent, Vec<Attempt<'_>>>,
    stored: &BTreeMap<Intent, Vec<StoredRow>>,
    report: &mut Report,
) {
    struct Read<'a> {
        exchange: &'a Exchange,
        state: (String, Option<String>),
    }
    let mut orders: BTreeMap<String, Vec<Read<'_>>> = BTreeMap::new();
    let mut absent: Vec<(&str, &Exchange)> = Vec::new();
    for exchange in &history.exchanges {
        let path = exchange.path.split('?').next().unwrap_or_default();
        let id = path.rsplit('/').next().unwrap_or_default();
        if exchange.method == "GET" && exchange.status == Some(404) {
            absent.push((id, exchange));
        }
        if !exchange
            .status
            .is_some_and(|status| (200..300).contains(&status))
        {
            continue;
        }
        let Ok(answer) = serde_json::from_str::<Value>(&exchange.answer) else {
            report.add(
                FindingKind::AnswersDiffer,
                &exchange.path,
                format!("the answer is not JSON: {}", exchange.answer),
            );
            continue;
        };
        let items = answer["items"]
            .as_array()
            .cloned()
            .unwrap_or_else(|| vec![answer]);
        for item in &items {
            for field in ["balance", "balance_after"] {
                if let Some(balance) = item[field].as_i64().filter(|balance| *balance < 0) {
                    report.add(
                        FindingKind::NegativeBalance,
                        &exchange.path,
                        format!("{field} {balance} was read"),
                    );
                }
            }
            // Only GETs show the current state: the answer to a POST always shows the order as NEW.
            if exchange.method == "GET"
                && let (Some(id), Some(status)) = (item["id"].as_str(), item["status"].as_str())
            {
                let state = (
                    status.to_owned(),
                    item["reason"].as_str().map(str::to_owned),
                );
                orders
                    .entry(id.to_owned())
                    .or_default()
                    .push(Read { exchange, state });
            }
        }
    }

    let stored: HashMap<&str, &StoredRow> = stored
        .iter()
        .filter(|(intent, _)| intent.0 == Resource::Order)
        .flat_map(|(_, rows)| rows)
        .map(|row| (row.id.as_str(), row))
        .collect();
    for (id, reads) in &orders {
        let is_final = |read: &&Read<'_>| read.state.0 != "NEW";
        let Some(first_final) = reads
            .iter()
            .filter(is_final)
            .min_by_key(|read| read.exchange.ended_us)
        else {
            continue;
        };
        let final_state = &first_final.state;
        let backwards = reads.iter().find(|read| {
            read.state != *final_state
                && (read.state.0 != "NEW" || read.exchange.begun_us > first_final.exchange.ended_us)
        });
        if let Some(read) = backwards {
            let words = format!(
                "read as {final_state:?} at {} us, then as {:?} at {} us",
                first_final.exchange.ended_us, read.state, read.exchange.begun_us
            );
            report.add(FindingKind::StatusBackwards, id, words);
        } else if let Some(row) = stored.get(id.as_str())
            && row.status != final_state.0
        {
            report.add(
                FindingKind::StatusBackwards,
                id,
                format!("read as {final_state:?}, but stored as {}", row.status),
            );
        }
    }

    let mut promised: HashMap<&str, u64> = HashMap::new();
    for (one, id) in keyed
        .values()
        .flatten()
        .filter_map(|one| Some((one, one.done()?)))
    {
        let at = promised.entry(id).or_insert(u64::MAX);
        *at = (*at).min(one.exchange.ended_us);
    }
    for (id, exchange) in absent {
        if promised.get(id).is_some_and(|at| *at < exchange.begun_us) {
            report.add(
                FindingKind::Lost,
                id,
                format!(
                    "{} was answered with 404 after it had been confirmed",
                    exchange.path
                ),
            );
        }
    }
}

/// Resource, user and attempt of a request. `None` if the request creates nothing.
fn intent(exchange: &Exchange) -> Option<(Resource, String, Attempt<'_>)> {
    if exchange.method != "POST" {
        return None;
    }
    let path: Vec<&str> = exchange.path.split('?').next()?.split('/').collect();
    let (resource, user) = match path.as_slice() {
        ["", "v1", "orders"] => (
            Resource::Order,
            exchange.body["user_id"].as_str()?.to_owned(),
        ),
        ["", "v1", "accounts"] => (
            Resource::Account,
            exchange.body["user_id"].as_str()?.to_owned(),
        ),
        ["", "v1", "accounts", user, "deposits"] => (Resource::Deposit, (*user).to_owned()),
        _ => return None,
    };
    let amount = if resource == Resource::Account {
        Some(0)
    } else {
        exchange.body["amount"].as_i64()
    };
    let description = exchange.body["description"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let content = amount.map(|amount| Content {
        amount,
        description,
    });
    Some((
        resource,
        user,
        Attempt {
            exchange,
            content,
            outcome: outcome(resource, exchange),
        },
    ))
}

fn outcome(resource: Resource, exchange: &Exchange) -> Outcome {
    let Some(status) = exchange.status else {
        return Outcome::Unknown;
    };
    let answer: Value = serde_json::from_str(&exchange.answer).unwrap_or_default();
    let code = answer["code"].as_str().unwrap_or_default().to_owned();
    match status {
        200..300 => {
            let name = match resource {
                Resource::Account => "user_id",
                Resource::Deposit => "transfer_id",
                Resource::Order => "id",
            };
            Outcome::Done {
                id: answer[name].as_str().unwrap_or_default().to_owned(),
            }
        }
        // A concurrent request with the key is running. (409 account_already_exists is a refusal.)
        409 if code != "account_already_exists" => Outcome::Unknown,
        400..500 => Outcome::Refused { code },
        // Without a problem code, the answer may come from a proxy and denies nothing.
        _ if code.is_empty() || answer["outcome"] == "unknown" => Outcome::Unknown,
        _ => Outcome::Denied,
    }
}
