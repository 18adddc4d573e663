//! Processor time and memory of the stack's processes, from the kernel.

use std::fs;

use anyhow::Context as _;
use stack::System;

/// All parts except the load generator.
pub(crate) const PARTS: [&str; 5] = ["postgres", "nats", "orders", "payments", "gateway"];

/// Processor seconds of a part since its start, including its child processes.
pub(crate) fn cpu_seconds(system: &mut System, part: &str) -> anyhow::Result<f64> {
    let pid = system
        .pid(part)
        .with_context(|| format!("{part} is not running"))?;
    let mut ticks = times(pid)
        .with_context(|| format!("{part} has exited"))?
        .own_and_reaped;
    for child in children(pid)? {
        // If a child ends meanwhile, its time is added to its parent.
        ticks += times(child).map_or(0, |times| times.own);
    }
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Peak memory of a part in MiB, without its child processes.
pub(crate) fn peak_memory_mib(system: &mut System, part: &str) -> anyhow::Result<f64> {
    memory(system, part, "VmHWM:")
}

/// Current memory of a part in MiB, without its child processes.
pub(crate) fn memory_mib(system: &mut System, part: &str) -> anyhow::Result<f64> {
    memory(system, part, "VmRSS:")
}

fn memory(system: &mut System, part: &str, which: &str) -> anyhow::Result<f64> {
    let pid = system
        .pid(part)
        .with_context(|| format!("{part} is not running"))?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(which))
        .context("the kernel reports no memory")?;
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
    // The program's name is in parentheses and may contain anything.
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
