//! I7: from every reachable state, including those after faults, a settled state can be reached
//! without further faults (in temporal logic: AG EF settled). The checker supports properties of a
//! state or a path; this is a property of the graph, so this module searches the graph backwards.

use std::collections::HashMap;

use anyhow::ensure;
use stateright::Model as _;

use crate::action::Action;
use crate::model::Protocol;
use crate::properties::is_settled;
use crate::state::State;

#[derive(Debug)]
pub struct Recovery {
    /// Number of reachable states.
    pub states: usize,
    /// Number of steps between them.
    pub steps: usize,
    /// Number of states from which no settled state can be reached.
    pub stuck: usize,
    /// The shortest path to such a state.
    pub path: Vec<Action>,
}

/// Checks the whole graph. Fails if it has more than `states_max` states.
pub fn check(protocol: &Protocol, states_max: usize) -> anyhow::Result<Recovery> {
    let mut graph = Graph::explore(protocol, states_max, |_| false)?;
    let steps = graph.steps;
    let can_settle = graph.backwards_from_settled(protocol);
    // States are numbered in breadth-first order, so the first one has a shortest path.
    let first_stuck = can_settle.iter().position(|can| !can);
    Ok(Recovery {
        states: graph.states.len(),
        steps,
        stuck: can_settle.iter().filter(|can| !**can).count(),
        path: first_stuck.map_or_else(Vec::new, |stuck| graph.path_to(protocol, stuck)),
    })
}

/// The shortest path to a state for which `wrong` holds; empty if there is none.
pub fn shortest_path(
    protocol: &Protocol,
    states_max: usize,
    wrong: impl Fn(&State) -> bool,
) -> anyhow::Result<Vec<Action>> {
    let graph = Graph::explore(protocol, states_max, &wrong)?;
    Ok(graph
        .states
        .iter()
        .position(wrong)
        .map_or_else(Vec::new, |state| graph.path_to(protocol, state)))
}

struct Graph {
    states: Vec<State>,
    /// The state from which each state was reached first.
    parents: Vec<u32>,
    /// Steps other than faults, as (from, to).
    sound: Vec<(u32, u32)>,
    steps: usize,
}

impl Graph {
    /// Explores breadth-first, up to the first state for which `enough` holds.
    fn explore(
        protocol: &Protocol,
        states_max: usize,
        enough: impl Fn(&State) -> bool,
    ) -> anyhow::Result<Self> {
        let mut graph = Self {
            states: protocol.init_states(),
            parents: vec![0],
            sound: Vec::new(),
            steps: 0,
        };
        let mut numbers: HashMap<State, u32> = HashMap::from([(graph.states[0], 0)]);
        let mut actions = Vec::new();
        let mut at = 0;
        while at < graph.states.len() {
            ensure!(
                graph.states.len() <= states_max,
                "more than {states_max} states"
            );
            let state = graph.states[at];
            if enough(&state) {
                break;
            }
            protocol.actions(&state, &mut actions);
            for action in actions.drain(..) {
                let Some(next) = protocol.next_state(&state, action) else {
                    continue;
                };
                graph.steps += 1;
                let number = *numbers.entry(next).or_insert_with(|| {
                    graph.states.push(next);
                    graph.parents.push(at as u32);
                    graph.states.len() as u32 - 1
                });
                if !action.is_fault() {
                    graph.sound.push((at as u32, number));
                }
            }
            at += 1;
        }
        Ok(graph)
    }

    /// For each state, whether a settled state can be reached from it.
    fn backwards_from_settled(&mut self, protocol: &Protocol) -> Vec<bool> {
        self.sound.sort_unstable_by_key(|(_, to)| *to);
        let mut can: Vec<bool> = self
            .states
            .iter()
            .map(|state| is_settled(protocol, state))
            .collect();
        let mut todo: Vec<u32> = (0..self.states.len() as u32)
            .filter(|number| can[*number as usize])
            .collect();
        while let Some(reached) = todo.pop() {
            let begin = self.sound.partition_point(|(_, to)| *to < reached);
            for (from, _) in self.sound[begin..]
                .iter()
                .take_while(|(_, to)| *to == reached)
            {
                if !std::mem::replace(&mut can[*from as usize], true) {
                    todo.push(*from);
                }
            }
        }
        can
    }

    fn path_to(&self, protocol: &Protocol, state: usize) -> Vec<Action> {
        let mut path = Vec::new();
        let mut at = state;
        while at != 0 {
            let parent = self.parents[at] as usize;
            let mut actions = Vec::new();
            protocol.actions(&self.states[parent], &mut actions);
            let leads_here = |action: &Action| {
                protocol.next_state(&self.states[parent], *action) == Some(self.states[at])
            };
            path.extend(actions.into_iter().find(leads_here));
            at = parent;
        }
        path.reverse();
        path
    }
}
