//! Processor time and memory of the processes of a stack, as the kernel counts them.

use std::fs;

use anyhow::Context as _;
use stack::System;

/// The parts that are counted: all but the load generator.
pub(crate) const PARTS: [&str; 5] = ["postgres", "nats", "orders", "payments", "gateway"];

/// Processor seconds of a part since it was started, with all processes it has started.
pub(crate) fn cpu_seconds(system: &mut System, part: &str) -> anyhow::Result<f64> {
    let pid = system
        .pid(part)
        .with_context(|| format!("{part} does not run"))?;
    let mut ticks = times(pid)
        .with_context(|| format!("{part} has gone"))?
        .own_and_reaped;
    for child in children(pid)? {
        // One that ends meanwhile is counted by its parent from then on.
        ticks += times(child).map_or(0, |times| times.own);
    }
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The most memory a part has had, in MiB; without its children.
pub(crate) fn peak_memory_mib(system: &mut System, part: &str) -> anyhow::Result<f64> {
    memory(system, part, "VmHWM:")
}

/// The memory a part has now, in MiB; without its children.
pub(crate) fn memory_mib(system: &mut System, part: &str) -> anyhow::Result<f64> {
    memory(system, part, "VmRSS:")
}

fn memory(system: &mut System, part: &str, which: &str) -> anyhow::Result<f64> {
    let pid = system
        .pid(part)
        .with_context(|| format!("{part} does not run"))?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(which))
        .context("the kernel counts no memory")?;
    let kib: f64 = line
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .with_context(|| format!("{which} is a number of kB"))?;
    Ok(kib / 1024.0)
}

struct Times {
    own: u64,
    own_and_reaped: u64,
    parent: u32,
}

fn times(pid: u32) -> Option<Times> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program is in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let own = number(11)? + number(12)?;
    Some(Times {
        own,
        own_and_reaped: own + number(13)? + number(14)?,
        parent: u32::try_from(number(1)?).ok()?,
    })
}

fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
    let all = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    Ok(all
        .filter(|other| times(*other).is_some_and(|times| times.parent == pid))
        .collect())
}
