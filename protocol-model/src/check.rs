//! Runs the model checker and returns its results.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use stateright::{Checker as _, HasDiscoveries, Model as _};

use crate::action::Action;
use crate::model::Protocol;
use crate::properties::I7;
use crate::recovery;

/// Limit of states for small models. All of them have far fewer.
const SMALL: usize = 3_000_000;

/// Result of a safety check.
#[derive(Debug)]
pub struct Safety {
    /// Number of distinct states.
    pub states: usize,
    /// Number of steps between them.
    pub steps: usize,
    /// Length of the longest path explored.
    pub depth: usize,
    pub took: Duration,
    /// Violated properties, each with a path to the violation.
    pub violated: Vec<(&'static str, Vec<Action>)>,
    /// Properties that must be reachable but are not. With any of them, the model proves nothing.
    pub never: Vec<&'static str>,
}

/// Checks every state, or stops at the first violation.
pub fn safety(protocol: &Protocol, threads: NonZeroUsize, until_first_violation: bool) -> Safety {
    let begun = Instant::now();
    let mut checker = protocol.checker().threads(threads.get());
    if until_first_violation {
        checker = checker.finish_when(HasDiscoveries::AnyFailures);
    }
    let checker = checker.spawn_bfs().join();
    let mut found = checker.discoveries();
    let (mut violated, mut never) = (Vec::new(), Vec::new());
    for property in protocol.properties() {
        match (&property.expectation, found.remove(property.name)) {
            (stateright::Expectation::Sometimes, None) => never.push(property.name),
            (stateright::Expectation::Sometimes, Some(_)) | (_, None) => {}
            (_, Some(path)) => violated.push((property.name, path.into_actions())),
        }
    }
    Safety {
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        took: begun.elapsed(),
        violated,
        never,
    }
}

/// The first property that a broken design violates, and the shortest path to the violation.
pub fn caught(protocol: &Protocol) -> anyhow::Result<Option<(&'static str, Vec<Action>)>> {
    let violated: Vec<&str> = safety(protocol, NonZeroUsize::MIN, true)
        .violated
        .iter()
        .map(|(name, _)| *name)
        .collect();
    if let Some(property) = protocol
        .properties()
        .into_iter()
        .find(|property| violated.contains(&property.name))
    {
        let path = recovery::shortest_path(protocol, SMALL, |state| {
            !(property.condition)(protocol, state)
        })?;
        return Ok(Some((property.name, path)));
    }
    let recovery = recovery::check(protocol, SMALL)?;
    Ok((recovery.stuck > 0).then_some((I7, recovery.path)))
}
