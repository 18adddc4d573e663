//! Medians, JSON for scripts, and the report with plots.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::load::{CLIENTS, Saturation, USERS};
use crate::{Figures, PlotData};

/// The value at `share` (0 to 1) of the sorted values.
pub(crate) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last as f64 * share).round() as usize)
        .copied()
        .unwrap_or_default()
}

/// The median of each figure over all runs.
pub(crate) fn medians(runs: &[Figures]) -> Figures {
    let mut medians = Figures::new();
    for name in runs.iter().flat_map(Figures::keys) {
        let mut values: Vec<f64> = runs
            .iter()
            .filter_map(|run| run.get(name).copied())
            .collect();
        values.sort_by(f64::total_cmp);
        medians.insert(name.clone(), percentile(&values, 0.5));
    }
    medians
}

struct Target {
    name: &'static str,
    value: f64,
    wanted: f64,
    at_least: bool,
}

fn targets(figures: &Figures) -> Vec<Target> {
    let get = |name: &str| figures.get(name).copied().unwrap_or(f64::NAN);
    let floor = [
        "floor_c1_debits_per_s",
        "floor_c8_debits_per_s",
        "floor_c32_debits_per_s",
    ]
    .map(get);
    let best = floor.into_iter().fold(f64::NAN, f64::max);
    let memory =
        ["orders", "payments", "gateway"].map(|part| get(&format!("memory_{part}_peak_mib")));
    let at_least = |name, value, wanted| Target {
        name,
        value,
        wanted,
        at_least: true,
    };
    let at_most = |name, value, wanted| Target {
        name,
        value,
        wanted,
        at_least: false,
    };
    let mut all = vec![
        at_least(
            "backlog, relative to the best floor",
            get("drain_decisions_per_s") / best,
            3.0,
        ),
        at_least(
            "end to end, relative to the best floor",
            get("e2e_finished_per_s") / best,
            0.6,
        ),
        at_most(
            "latency at 100 orders/s, p50, ms",
            get("latency_100_p50_ms"),
            6.0,
        ),
        at_most(
            "latency at 100 orders/s, p99, ms",
            get("latency_100_p99_ms"),
            20.0,
        ),
        at_least(
            "all orders on one account, relative to 1,000 accounts",
            get("hot_account_ratio"),
            0.8,
        ),
        at_least(
            "two replicas of each service, relative to one",
            get("replicas_ratio"),
            1.0,
        ),
        at_least(
            "end to end with millions of old orders, relative to empty tables",
            get("prefilled_e2e_ratio"),
            0.9,
        ),
        at_least(
            "backlog with millions of old orders, relative to empty tables",
            get("prefilled_drain_ratio"),
            0.9,
        ),
        at_most(
            "CPU seconds for 1,000 orders",
            get("cpu_s_per_1000_orders"),
            0.6,
        ),
        at_most(
            "CPU at rest, % of a core",
            get("rest_cpu_percent_of_a_core"),
            1.0,
        ),
        at_most(
            "largest service, MiB",
            memory.into_iter().fold(f64::NAN, f64::max),
            64.0,
        ),
    ];
    // Drops targets that were not measured.
    all.retain(|target| target.value.is_finite());
    all
}

/// Writes `latest.json` next to the build and, if asked for, the report with plots.
pub(crate) fn write(
    figures: &Figures,
    plot_data: &PlotData,
    binaries: &Path,
    report: Option<&Path>,
) -> anyhow::Result<()> {
    let folder = binaries.parent().unwrap_or(binaries).join("bench");
    fs::create_dir_all(&folder)?;
    fs::write(
        folder.join("latest.json"),
        serde_json::to_string_pretty(figures)? + "\n",
    )?;
    for target in targets(figures) {
        eprintln!(
            "{:<66} {:>8.2}  {}",
            target.name,
            target.value,
            verdict(&target)
        );
    }
    eprintln!("{}", folder.join("latest.json").display());
    let Some(report) = report else { return Ok(()) };
    fs::create_dir_all(report)?;
    fs::write(
        report.join("latency.svg"),
        latency_plot(&plot_data.latencies),
    )?;
    fs::write(report.join("rate.svg"), rate_plot(&plot_data.saturation))?;
    fs::write(report.join("README.md"), markdown(figures))?;
    fs::write(
        report.join("figures.json"),
        serde_json::to_string_pretty(figures)? + "\n",
    )?;
    eprintln!("{}", report.join("README.md").display());
    Ok(())
}

fn verdict(target: &Target) -> String {
    let met = if target.at_least {
        target.value >= target.wanted
    } else {
        target.value <= target.wanted
    };
    let sign = if target.at_least { "≥" } else { "≤" };
    format!(
        "{sign} {} {}",
        target.wanted,
        if met { "met" } else { "MISSED" }
    )
}

fn markdown(figures: &Figures) -> String {
    let mut text = String::from(
        "# Benchmark\n\nGenerated by `./dev bench`. Load generator, services, PostgreSQL and NATS share one machine.\n\
         Everything is measured in turns and the medians of the runs count, so ratios say more than rates.\n\
         Durability is on everywhere (fsync, synchronous_commit, sync_interval always). Every order is\n\
         audited at the end.\n\n",
    );
    let _ = writeln!(text, "| figure | measured | target |\n|---|---:|---|");
    for target in targets(figures) {
        let _ = writeln!(
            text,
            "| {} | {:.2} | {} |",
            target.name,
            target.value,
            verdict(&target)
        );
    }
    let _ = writeln!(
        text,
        "\n- Floor: `pgbench` with one debit per transaction (inbox, account, transfer, outbox) and prepared\n  \
         statements, on the same server.\n\
         - End to end: {CLIENTS} clients in a closed loop, {USERS} accounts, from POST to FINISHED through HTTP,\n  \
         two relays and three services.\n\
         - Latency: each order is sent when it is due, however slow the earlier ones are.\n\n\
         ![latency from POST to FINISHED at 100 orders per second](latency.svg)\n\n\
         ![orders accepted and finished per second at saturation](rate.svg)\n\n\
         [PROFILE.md](PROFILE.md) explains where the time goes and why targets are missed.\n"
    );
    let _ = writeln!(text, "| figure | value |\n|---|---:|");
    for (name, value) in figures {
        let _ = writeln!(text, "| `{name}` | {value:.3} |");
    }
    let _ = writeln!(text, "\n| environment | |\n|---|---|");
    for (name, value) in machine() {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    text
}

fn machine() -> Vec<(&'static str, String)> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let output_of = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok();
        output
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
            .unwrap_or_default()
    };
    vec![
        ("processor", format!("{model}, {cores} cores")),
        ("kernel", output_of("uname", &["-sr"])),
        ("rustc", output_of("rustc", &["--version"])),
        (
            "commit",
            output_of("git", &["describe", "--always", "--dirty"]),
        ),
        (
            "load average at the end",
            fs::read_to_string("/proc/loadavg")
                .unwrap_or_default()
                .trim()
                .to_owned(),
        ),
    ]
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 60.0;
const BOTTOM: f64 = 40.0;

/// A line of a plot: positions from 0 to 1 and their values.
struct Series {
    name: &'static str,
    color: &'static str,
    points: Vec<(f64, f64)>,
}

/// A plot: axes with ticks, and a line for each series.
fn plot(
    x_title: &str,
    y_title: &str,
    x_ticks: &[(f64, String)],
    y_max: f64,
    series: &[Series],
) -> String {
    let x = |share: f64| LEFT + share * (WIDTH - LEFT - 20.0);
    let y = |value: f64| HEIGHT - BOTTOM - value / y_max * (HEIGHT - BOTTOM - 30.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    for step in 0..=4 {
        let value = y_max * f64::from(step) / 4.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\" fill=\"#555\">{value:.0}</text>",
            x(1.0),
            y(value),
            LEFT - 6.0,
            y(value) + 4.0
        );
    }
    for (share, label) in x_ticks {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{label}</text>",
            x(*share),
            HEIGHT - BOTTOM + 16.0
        );
    }
    for (
        number,
        Series {
            name,
            color,
            points,
        },
    ) in series.iter().enumerate()
    {
        let line: Vec<String> = points
            .iter()
            .map(|(share, value)| format!("{:.1},{:.1}", x(*share), y(*value)))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>",
            line.join(" ")
        );
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"18\" fill=\"{color}\">{name}</text>",
            LEFT + 120.0 * number as f64
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{x_title}</text>\
         <text x=\"{:.1}\" y=\"18\" text-anchor=\"end\" fill=\"#555\">{y_title}</text>\n</svg>",
        x(1.0),
        HEIGHT - 6.0,
        x(1.0)
    );
    svg
}

/// Latency by percentile on a logarithmic axis: each step is a tenth of the remaining orders.
fn latency_plot(latencies: &[f64]) -> String {
    const NINES: f64 = 3.0;
    let points = (0..=300).map(|step| {
        let share = f64::from(step) / 300.0;
        (
            share,
            percentile(latencies, 1.0 - 10_f64.powf(-NINES * share)),
        )
    });
    let ticks = [
        (0.0, "fastest"),
        (0.1, "50 %"),
        (1.0 / 3.0, "90 %"),
        (2.0 / 3.0, "99 %"),
        (1.0, "99.9 %"),
    ];
    let ticks = ticks.map(|(share, label)| (share, label.to_owned()));
    let y_max = (percentile(latencies, 0.999) / 4.0).ceil().max(1.0) * 4.0;
    plot(
        "share of orders",
        "ms from POST to FINISHED",
        &ticks,
        y_max,
        &[Series {
            name: "100 orders/s",
            color: "#0b6e4f",
            points: points.collect(),
        }],
    )
}

fn rate_plot(saturation: &Saturation) -> String {
    let seconds = &saturation.over_time;
    let most = seconds
        .iter()
        .map(|(accepted, finished)| *accepted.max(finished))
        .max()
        .unwrap_or(1);
    let y_max = (most as f64 / 400.0).ceil() * 400.0;
    let last = seconds.len().saturating_sub(1).max(1) as f64;
    let line = |pick: fn(&(u64, u64)) -> u64| {
        seconds
            .iter()
            .enumerate()
            .map(|(second, both)| (second as f64 / last, pick(both) as f64))
            .collect::<Vec<_>>()
    };
    let ticks: Vec<(f64, String)> = (0..seconds.len())
        .map(|second| (second as f64 / last, second.to_string()))
        .collect();
    let accepted = Series {
        name: "accepted",
        color: "#b5651d",
        points: line(|both| both.0),
    };
    let finished = Series {
        name: "finished",
        color: "#0b6e4f",
        points: line(|both| both.1),
    };
    plot(
        "second",
        "orders per second",
        &ticks,
        y_max,
        &[accepted, finished],
    )
}
