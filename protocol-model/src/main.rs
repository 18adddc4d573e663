//! `./dev model`: checks the large models, then that every state can still be settled, then that
//! each broken design is caught. Prints a table; exit code 0 only if every result is as expected.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use protocol_model::broken::{BROKEN, SMALLEST, WITHOUT_LOSS_OR_RECONCILER};
use protocol_model::check::{caught, safety};
use protocol_model::design::Window;
use protocol_model::model::Protocol;
use protocol_model::recovery;

/// Minimum number of states of all [`SAFETY`] models together.
const STATES_MIN: usize = 50_000_000;
/// Limit of states for [`RECOVERY`] models. All of them have fewer.
const RECOVERY_MAX: usize = 5_000_000;

/// Models whose properties are checked in every state.
const SAFETY: [Protocol; 8] = [
    Protocol {
        relays: 2,
        payments_consumers: 2,
        losses: 1,
        money: 0,
        deposit: true,
        ..SMALLEST
    },
    Protocol {
        losses: 2,
        money: 0,
        deposit: true,
        ..SMALLEST
    },
    Protocol {
        losses: 1,
        slow: 1,
        money: 0,
        deposit: true,
        ..SMALLEST
    },
    Protocol {
        payments_consumers: 2,
        losses: 2,
        ..SMALLEST
    },
    Protocol {
        relays: 2,
        payments_consumers: 2,
        losses: 1,
        window: Window::Endless,
        ..SMALLEST
    },
    Protocol {
        orders: 2,
        payments_consumers: 2,
        ..SMALLEST
    },
    Protocol {
        orders: 2,
        relays: 2,
        ..SMALLEST
    },
    Protocol {
        relays: 2,
        losses: 2,
        ..SMALLEST
    },
];

/// Models where every order must be able to become final from every state.
const RECOVERY: [Protocol; 7] = [
    Protocol {
        relays: 2,
        payments_consumers: 2,
        losses: 1,
        ..SMALLEST
    },
    Protocol {
        losses: 2,
        ..SMALLEST
    },
    Protocol {
        losses: 1,
        slow: 1,
        ..SMALLEST
    },
    Protocol {
        losses: 1,
        slow: 1,
        window: Window::Endless,
        ..SMALLEST
    },
    Protocol {
        losses: 1,
        money: 0,
        deposit: true,
        ..SMALLEST
    },
    Protocol {
        orders: 2,
        ..SMALLEST
    },
    WITHOUT_LOSS_OR_RECONCILER,
];

/// Checks the protocol by exploring all possible sequences of steps and faults.
#[derive(Parser)]
struct Arguments {
    /// Check only large models whose name contains this.
    #[arg(default_value = "")]
    only: String,
    /// Threads for the large models.
    #[arg(long, default_value = "1")]
    threads: NonZeroUsize,
    /// Skip the large models.
    #[arg(long)]
    small: bool,
    /// Print the path to each violation.
    #[arg(long)]
    ways: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let begun = Instant::now();
    let mut wrong = 0;

    println!(
        "Every state of:{:>63} {:>14} {:>6} {:>8}",
        "states", "steps", "depth", "time"
    );
    let (mut states, mut steps) = (0, 0);
    let wanted = |protocol: &Protocol| !arguments.small && name(protocol).contains(&arguments.only);
    for protocol in SAFETY.into_iter().filter(wanted) {
        let found = safety(&protocol, arguments.threads, false);
        states += found.states;
        steps += found.steps;
        let verdict = match (found.violated.first(), found.never.first()) {
            (None, None) => "all properties hold".to_owned(),
            (Some((property, path)), _) => format!("VIOLATED {property}: {}", path_text(path)),
            (None, Some(property)) => format!("PROVES NOTHING: never reached: {property}"),
        };
        wrong += found.violated.len() + found.never.len();
        let (counted, took) = (thousands(found.states), seconds(found.took));
        println!(
            "  {:<64} {counted:>11} {:>14} {:>6} {took:>8}  {verdict}",
            name(&protocol),
            thousands(found.steps),
            found.depth
        );
    }
    println!(
        "  {:<64} {:>11} {:>14}",
        "together",
        thousands(states),
        thousands(steps)
    );
    if !arguments.only.is_empty() {
        return Ok(if wrong == 0 && states > 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    if states < STATES_MIN && !arguments.small {
        println!(
            "  TOO FEW: at least {} states are required",
            thousands(STATES_MIN)
        );
        wrong += 1;
    }

    println!("\nFrom every state, every order can become final without further faults:");
    for protocol in RECOVERY {
        let begun = Instant::now();
        let found = recovery::check(&protocol, RECOVERY_MAX)?;
        let verdict = if found.stuck == 0 {
            "no state is stuck".to_owned()
        } else {
            format!("{} STUCK: {}", found.stuck, path_text(&found.path))
        };
        wrong += usize::from(found.stuck > 0);
        let (counted, took) = (thousands(found.states), seconds(begun.elapsed()));
        println!(
            "  {:<64} {counted:>11} {:>14} {:>6} {took:>8}  {verdict}",
            name(&protocol),
            thousands(found.steps),
            ""
        );
    }

    println!("\nBroken designs, each without one guard:");
    for broken in BROKEN {
        let verdict = match caught(&broken.protocol)? {
            Some((property, path)) if property == broken.violates => {
                let steps = format!("{property}, in {} steps", path.len());
                if arguments.ways {
                    format!("{steps}\n      {}", path_text(&path))
                } else {
                    steps
                }
            }
            Some((property, _)) => {
                wrong += 1;
                format!("VIOLATES {property} instead of {}", broken.violates)
            }
            None => {
                wrong += 1;
                "NOT CAUGHT".to_owned()
            }
        };
        println!("  {:<50} {verdict}", broken.name);
    }

    println!(
        "\n{} states, {} steps, {wrong} wrong, {}.",
        thousands(states),
        thousands(steps),
        seconds(begun.elapsed())
    );
    Ok(if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn name(protocol: &Protocol) -> String {
    let Protocol {
        orders,
        relays,
        payments_consumers,
        losses,
        slow,
        money,
        deposit,
        window,
        design,
    } = *protocol;
    let plural = |number: usize, word: &str| {
        format!("{number} {word}{}", if number == 1 { "" } else { "s" })
    };
    let mut parts = vec![
        plural(orders, "order"),
        plural(relays, "relay"),
        plural(payments_consumers, "consumer"),
    ];
    if losses > 0 {
        parts.push(format!("{losses} lost"));
    }
    if slow > 0 {
        parts.push(format!("{slow} slow"));
    }
    parts.push(format!("money for {money}"));
    if deposit {
        parts.push("deposit".to_owned());
    }
    if window == Window::Endless {
        parts.push("ids kept".to_owned());
    }
    if design.without_reconciler {
        parts.push("no reconciler".to_owned());
    }
    parts.join(", ")
}

fn path_text(path: &[protocol_model::action::Action]) -> String {
    path.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n      ")
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f32())
}

fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
