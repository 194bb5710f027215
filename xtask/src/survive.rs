//! `cargo xtask survivors`: one small program per kind of kernel state, through a panic.
//!
//! All of them run side by side in one guest. What each says of itself in the kernel that came after is held against two things: what is
//! promised of it, and what the report claims. A process that the report calls whole and whose survivor fails is the worst outcome.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use lab::image::DEMO_UID;
use lab::{Channel, Guest, Lab, MachineConfig, Panic, Program, Series, Snapshot};
use survivors::{Expect, Needs, Survivor, TABLE};

use crate::crash::{self, Quiet};
use crate::crash_runs::Tally;
use crate::guest::{self, Installation};
use crate::{Global, ui};

/// The survivors' binary in a guest.
pub const PROGRAM: &str = "/usr/local/lib/otherworld/survivors/survivors";
const READY_DEADLINE: Duration = Duration::from_secs(240);
const VERDICT_DEADLINE: Duration = Duration::from_secs(150);
/// What was swapped out stays in memory as well for as long as there is room; the kernel is asked to make some.
const EMPTY_SWAP_CACHE: &str = "for i in $(seq 100); do
    [ $(awk '/^SwapCached:/ { print $2 }' /proc/meminfo) -lt 512 ] && exit 0
    echo 4M > /sys/fs/cgroup/memory.reclaim || true
done; grep Swap /proc/meminfo; exit 1";
/// The survivor with the names and contents that the disk has not heard of.
const FILES: [&str; 2] = ["names-files", "names-large"];
/// The kind of survivors that are about what is on the disk.
const NAMES: &str = "names";
/// Makes the root read-only, and looks whether it is without a fault.
pub const CHECK_EXT4: &str = "echo u > /proc/sysrq-trigger
    for i in $(seq 100); do grep -q ' / ext4 ro' /proc/mounts && break; sleep 0.1; done
    grep -q ' / ext4 ro' /proc/mounts && e2fsck -fn $(findmnt -no SOURCE /) 2>&1";
/// The same for the second disk, which nobody uses any more.
const CHECK_XFS: &str = "umount /srv/data && xfs_repair -n /dev/vdb 2>&1";
/// An XFS on the second disk, and the survivors' directories in it.
const MAKE_XFS: &str = "mkfs.xfs -q /dev/vdb && mkdir /srv/data && mount /dev/vdb /srv/data &&
    echo '/dev/vdb /srv/data xfs defaults 0 2' >> /etc/fstab &&
    mkdir /srv/data/root && install -d -o demo /srv/data/demo &&
    ln -s /srv/data/root /root/survivors && ln -s /srv/data/demo /home/demo/survivors";
/// A swap area in compressed memory; and huge pages, as beside the usual ones.
const MAKE_ZRAM: &str =
    "sysctl -qw vm.nr_hugepages=12 && modprobe zram && echo ALGORITHM > /sys/block/zram0/comp_algorithm &&
    echo 192M > /sys/block/zram0/disksize && mkswap -q /dev/zram0 && swapon /dev/zram0";
/// MiB of a disk that has room for the large ones.
const XFS_MIB: u32 = 3072;
/// MiB of a machine that has a GiB in its page cache.
const LARGE_MIB: u32 = 3584;
/// Nothing reaches the disk but what is synced.
const HOLD_WRITE_BACK: &str = "sysctl -q vm.dirty_writeback_centisecs=0 vm.dirty_expire_centisecs=360000 vm.dirty_ratio=90 vm.dirty_background_ratio=85 &&
    mount -o remount,commit=600 / && { ! mountpoint -q /srv/data || sysctl -q fs.xfs.xfssyncd_centisecs=720000; }";
/// Codes of losses that all survivors have alike and none looks at.
const OF_ALL: &[&str] = &["cgroup", "crash-procedure"];
/// The panic comes within so many microseconds after all are ready.
const MOMENTS_US: u64 = 2_000_000;
/// The CPU that panics; computing survivors are on the other, where they are caught in user mode.
const PANIC_CPU: usize = 0;
const COMPUTING_CPU: usize = 1;

/// Starts the survivors, panics the guest, and holds what became of each against what is promised and what the report claims.
#[derive(Debug, Args)]
pub struct Survivors {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many panics.
    #[arg(long, default_value_t = 1)]
    crashes: u32,
    /// Draws the moments; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Only these; a part of a name means all that contain it.
    names: Vec<String>,
    /// Survivors damage their own state before they check it: all must fail (to see that they can).
    #[arg(long)]
    damage: bool,
    /// The file system under the survivors of names and files, which are the only ones that can be chosen with another than ext4.
    #[arg(long, value_enum, default_value_t)]
    fs: FileSystem,
    /// Swaps to memory that is compressed like that (zram: lzo-rle, lz4, zstd), instead of a file and a disk.
    #[arg(long, conflicts_with = "fs")]
    zram: Option<String>,
    /// Leave the register saver module out.
    #[arg(long)]
    no_saver: bool,
}

/// A file system for the survivors of names and files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum FileSystem {
    /// That of the machine's root directory.
    #[default]
    Ext4,
    /// On a second disk.
    Xfs,
}

impl Survivors {
    /// All survivors on one kernel, as part of the tests.
    pub fn new(kernel: Series) -> Self {
        Self {
            kernel: Some(kernel),
            crashes: 1,
            seed: None,
            names: Vec::new(),
            damage: false,
            fs: FileSystem::default(),
            zram: None,
            no_saver: false,
        }
    }

    /// Runs it; whether all became what is promised.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.count(global)?.close())
    }

    /// Runs it and counts.
    pub fn count(self, global: &Global) -> Result<Tally> {
        let chosen = choose(&self.names)?;
        if self.fs != FileSystem::Ext4 && chosen.iter().any(|survivor| survivor.kind != NAMES) {
            bail!("with --fs only survivors of names can be chosen: `survivors files --fs xfs`");
        }
        let only_files = chosen.iter().all(|survivor| FILES.contains(&survivor.name));
        let lab = global.lab()?;
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let mut draw = fastrand::Rng::with_seed(seed);
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let mut config = MachineConfig::new(series, global.accel());
            let mut installation =
                Installation { saver: !self.no_saver, memory: true, ..Installation::for_programs(PROGRAM) };
            if let Some(algorithm) = &self.zram {
                (installation.memory, installation.prepare) =
                    (false, MAKE_ZRAM.replace("ALGORITHM", algorithm));
            }
            if chosen.iter().any(|survivor| survivor.name == FILES[1]) {
                config.memory_mib = LARGE_MIB;
            }
            if self.fs == FileSystem::Xfs {
                config.scratch_mib = XFS_MIB;
                (installation.memory, installation.prepare) = (false, MAKE_XFS.into());
            }
            let armed = guest::armed(&lab, &lab.booted(&config)?, &installation)?;
            for n in 1..=self.crashes {
                ui::line(format!("kernel {series}, panic {n} of {}, seed {seed}", self.crashes));
                let name = match self.fs {
                    FileSystem::Ext4 => format!("survivors-{series}-{n}"),
                    FileSystem::Xfs => format!("survivors-xfs-{series}-{n}"),
                };
                let crashed = self.once(&lab, &armed, &name, &chosen, &mut draw);
                let rows = crashed.with_context(|| format!("survivors on kernel {series}"))?;
                if only_files {
                    tally.add(self.cases(&rows)?);
                    continue;
                }
                tally.passed += rows.iter().filter(|row| row.good).count();
                tally.failed += rows.iter().filter(|row| !row.good).count();
            }
        }
        Ok(tally)
    }

    /// The cases of the survivor of files, each for itself.
    fn cases(&self, rows: &[Row]) -> Result<Tally> {
        let expected = if self.damage { "fail " } else { "pass " };
        let mut tally = Tally::default();
        for line in rows.iter().flat_map(|row| row.cases.lines()) {
            match line.starts_with(expected) {
                true => tally.passed += 1,
                false => {
                    tally.failed += 1;
                    ui::failure(format!("! {line}"));
                }
            }
        }
        // None at all: it did not come back.
        let bad = rows.iter().filter(|row| !row.good && row.cases.is_empty()).count();
        Ok(Tally { failed: tally.failed + bad, ..tally })
    }

    fn once(
        &self,
        lab: &Lab,
        armed: &Snapshot,
        name: &str,
        chosen: &[&'static Survivor],
        draw: &mut fastrand::Rng,
    ) -> Result<Vec<Row>> {
        let mut guest = lab.start(armed, name)?;
        guest::seed(&mut guest, draw.u64(..))?;
        let only_names = chosen.iter().all(|survivor| survivor.kind == NAMES);
        // The cases are about what is not on the disk; random operations may be anywhere on their way to it.
        if only_names && (chosen.iter().any(|survivor| FILES.contains(&survivor.name)) || draw.bool()) {
            guest.agent.shell(HOLD_WRITE_BACK, READY_DEADLINE).context("holding write-back off")?;
        }
        if chosen.iter().all(|survivor| survivor.needs == Needs::Alone) {
            // If the only one is given up, the others' verdicts are still to be had.
            let crowd = Program::new([PROGRAM, "crowd", "--processes", "1"]);
            guest.agent.run(&crowd, READY_DEADLINE)?;
        }
        ui::note(&format!("starting {} survivors", chosen.len()));
        let mut pids = BTreeMap::new();
        // Before there is anything else that could go with it.
        let (swaps, others): (Vec<&Survivor>, Vec<&Survivor>) =
            chosen.iter().copied().partition(|survivor| survivor.needs == Needs::Swap);
        if !swaps.is_empty() {
            pids.extend(start(&mut guest.agent, &swaps, None, self.damage)?);
            guest.agent.shell(EMPTY_SWAP_CACHE, READY_DEADLINE).context("emptying the swap cache")?;
        }
        for computing in [false, true] {
            let these: Vec<_> =
                others.iter().copied().filter(|survivor| survivor.is_computing() == computing).collect();
            pids.extend(start(&mut guest.agent, &these, computing.then_some(COMPUTING_CPU), self.damage)?);
        }
        let panic = Panic {
            after_us: draw.u64(..MOMENTS_US),
            cpu: Some(PANIC_CPU),
            alive: pids.values().copied().collect(),
        };
        let fates = through(&mut guest, &panic).inspect_err(|_| _ = guest.keep_artifacts())?;
        let rows = chosen
            .iter()
            .map(|survivor| {
                let line = verdict(&mut guest, survivor);
                let claim =
                    pids.get(survivor.name).and_then(|pid| fates.get(pid)).cloned().unwrap_or_default();
                let mut row = Row::judge(survivor, &line, &claim, self.damage);
                if FILES.contains(&survivor.name) {
                    let path = format!("{}/{}.d/cases", directory(needs_root(survivor)), survivor.name);
                    row.cases = String::from_utf8_lossy(&guest.agent.read_file(path).unwrap_or_default())
                        .into_owned();
                }
                row
            })
            .collect::<Vec<_>>();
        tell(&rows);
        if only_names {
            let check = match self.fs {
                FileSystem::Ext4 => CHECK_EXT4,
                FileSystem::Xfs => CHECK_XFS,
            };
            guest.agent.shell(check, VERDICT_DEADLINE).context("the file system's check finds faults")?;
        }
        if !swaps.is_empty() && swapped_bytes(&guest)? == 0 {
            bail!("nothing was read from the swap areas: the survivors of swap have shown nothing");
        }
        guest::keep_table(&guest, &rows, rows.iter().any(|row| !row.good))?;
        Ok(rows)
    }
}

fn choose(names: &[String]) -> Result<Vec<&'static Survivor>> {
    // The suite's short name, which is a part of other ones.
    let meant = |name: &String| match name.as_str() {
        "files" => FILES.map(str::to_owned).to_vec(),
        _ => vec![name.clone()],
    };
    let names: Vec<String> = names.iter().flat_map(meant).collect();
    if let Some(unknown) =
        names.iter().find(|name| !TABLE.iter().any(|survivor| survivor.name.contains(name.as_str())))
    {
        bail!("no survivor's name contains {unknown}");
    }
    let is_meant = |survivor: &Survivor| {
        names.is_empty() && survivor.needs != Needs::Alone
            || names.iter().any(|name| match survivors::find(name) {
                Some(exactly) => exactly.name == survivor.name,
                None => survivor.name.contains(name.as_str()),
            })
    };
    Ok(TABLE.iter().filter(|survivor| is_meant(survivor)).collect())
}

/// Starts survivors, those that can as the unprivileged user, and waits until they are ready; their process ids by name.
pub fn start(
    agent: &mut Channel,
    these: &[&Survivor],
    cpu: Option<usize>,
    damage: bool,
) -> Result<BTreeMap<String, i32>> {
    let mut pids = BTreeMap::new();
    for root in [false, true] {
        let names: Vec<_> = these
            .iter()
            .filter(|survivor| needs_root(survivor) == root)
            .map(|survivor| survivor.name)
            .collect();
        if names.is_empty() {
            continue;
        }
        let mut argv: Vec<String> =
            [PROGRAM, "start", "--dir", directory(root), "--timeout", "200"].map(Into::into).into();
        if damage {
            argv.push("--damage".into());
        }
        if let Some(cpu) = cpu {
            argv.extend(["--cpu".into(), cpu.to_string()]);
        }
        argv.extend(names.iter().map(|&name| name.to_owned()));
        let program = Program::new(argv).uid(if root { 0 } else { DEMO_UID });
        let output = agent.run(&program, READY_DEADLINE)?;
        for line in output.lines() {
            let mut words = line.split_whitespace();
            if let (Some("ready"), Some(name), Some(Ok(pid))) =
                (words.next(), words.next(), words.next().map(str::parse))
            {
                pids.insert(name.to_owned(), pid);
            }
        }
        if let Some(missing) = names.iter().find(|&&name| !pids.contains_key(name)) {
            bail!("{missing} did not get ready");
        }
    }
    Ok(pids)
}

/// Panics, and waits for the crash kernel's agent; what the report claims of each process.
pub fn claims_after(guest: &mut Guest, panic: &Panic) -> Result<BTreeMap<i32, Claim>> {
    Ok(panic_and_claims(guest, panic)?.1)
}

/// [`claims_after`], and when the panic was.
pub fn panic_and_claims(guest: &mut Guest, panic: &Panic) -> Result<(Instant, BTreeMap<i32, Claim>)> {
    let Some(line) = crash::crash(guest, panic, &mut Quiet)? else {
        bail!("some program had ended before the panic")
    };
    let panicked = Instant::now();
    ui::note("waiting for them under the second kernel");
    crash::wait_agent(guest, &line, &mut Vec::new(), &mut Quiet)?;
    crash::fetch_report(guest)?;
    let report = fs::read_to_string(guest.dir.join("report.json"))?;
    Ok((panicked, claims(&serde_json::from_str(&report).context("the report is not JSON")?)))
}

/// Panics and waits until the survivors have ended under the second kernel (or their time is over); what the report claims of
/// each process.
pub fn through(guest: &mut Guest, panic: &Panic) -> Result<BTreeMap<i32, Claim>> {
    let claims = claims_after(guest, panic)?;
    guest.agent.wait(&panic.alive, VERDICT_DEADLINE)?;
    Ok(claims)
}

/// The line that a survivor has left; empty if none.
pub fn verdict(guest: &mut Guest, survivor: &Survivor) -> String {
    let path = format!("{}/{}", directory(needs_root(survivor)), survivor.name);
    String::from_utf8_lossy(&guest.agent.read_file(path).unwrap_or_default()).trim().to_owned()
}

/// Whether it is started as root, and not as the unprivileged user.
pub fn needs_root(survivor: &Survivor) -> bool {
    matches!(survivor.needs, Needs::Root | Needs::Tty | Needs::Console | Needs::HugePages)
}

fn directory(root: bool) -> &'static str {
    if root { "/root/survivors" } else { "/home/demo/survivors" }
}

/// How much the crash kernel has read from swap areas.
fn swapped_bytes(guest: &Guest) -> Result<u64> {
    let report = fs::read_to_string(guest.dir.join("report.json"))?;
    let report: serde_json::Value = serde_json::from_str(&report).context("the report is not JSON")?;
    Ok(report["resurrection"]["swapped_bytes"].as_u64().unwrap_or(0))
}

/// What the report says of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// Whose child it was; 0 if it says nothing.
    pub ppid: i32,
    /// `resurrected`, `given-up` …; empty if it says nothing.
    pub fate: String,
    /// Code and text of each reason.
    pub reasons: Vec<(String, String)>,
}

impl Claim {
    /// Whether it runs again, with losses or without.
    pub fn lives(&self) -> bool {
        self.fate.starts_with("resurrected")
    }

    /// Whether it became what its crash procedure wanted it to.
    pub fn obeyed(&self) -> bool {
        matches!(self.fate.as_str(), "restarted" | "ended")
    }

    /// Whether it lives and has lost nothing that a survivor could notice.
    pub fn whole(&self) -> bool {
        self.lives() && self.reasons.iter().all(|(code, _)| OF_ALL.contains(&code.as_str()))
    }

    /// Whether a reason with this code is given.
    pub fn has(&self, code: &str) -> bool {
        self.reasons.iter().any(|(found, _)| found == code)
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fate = if self.fate.is_empty() { "not in the report" } else { &self.fate };
        let reasons: Vec<_> = self.reasons.iter().map(|(code, text)| format!("{text} [{code}]")).collect();
        write!(f, "{fate}{}{}", if reasons.is_empty() { "" } else { ": " }, reasons.join("; "))
    }
}

/// What a report says of each process.
pub fn claims(report: &serde_json::Value) -> BTreeMap<i32, Claim> {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let claim = |process: &serde_json::Value| {
        let reasons = process["reasons"].as_array().into_iter().flatten();
        let reasons = reasons.map(|reason| (text(&reason["code"]), text(&reason["text"]))).collect();
        let number = |key| process[key].as_i64().map(|pid| pid as i32);
        let ppid = number("ppid").unwrap_or(0);
        Some((number("pid")?, Claim { ppid, fate: text(&process["fate"]), reasons }))
    };
    report["processes"].as_array().into_iter().flatten().filter_map(claim).collect()
}

/// What a report says of a process's children, grandchildren and so on.
pub fn descendants(claims: &BTreeMap<i32, Claim>, pid: i32) -> Vec<Claim> {
    let (mut family, mut all) = (BTreeSet::from([pid]), Vec::new());
    let mut next = vec![pid];
    while let Some(parent) = next.pop() {
        for (child, claim) in claims.iter().filter(|(_, claim)| claim.ppid == parent) {
            if family.insert(*child) {
                next.push(*child);
                all.push(claim.clone());
            }
        }
    }
    all
}

/// What became of one survivor: a row of the table.
#[derive(Debug)]
struct Row {
    name: &'static str,
    kind: &'static str,
    expected: &'static str,
    got: String,
    reason: String,
    good: bool,
    /// What it says of each of its cases, a line each.
    cases: String,
}

impl Row {
    fn judge(survivor: &Survivor, line: &str, claim: &Claim, damage: bool) -> Self {
        let (expected, trouble) = match survivor.expect {
            Expect::Survives if damage => {
                ("fail", (!line.starts_with("fail ")).then(|| format!("it was damaged; {claim}")))
            }
            Expect::Survives => {
                ("pass", (line != format!("pass {}", survivor.name)).then(|| why_not(line, claim)))
            }
            Expect::GivenUp(reason) => {
                let named =
                    claim.fate == "given-up" && claim.reasons.iter().any(|(_, text)| text.contains(reason));
                let trouble = || format!("was to be given up because of \"{reason}\"; {claim} {line}");
                ("given-up", (!named || !line.is_empty()).then(trouble))
            }
        };
        let false_claim = match line {
            "" if claim.lives() => Some("the report says that it lives, but it has come to no verdict"),
            "" => None,
            _ if !claim.lives() => Some("it ran, although the report denies it"),
            _ if line.starts_with("fail ") && claim.whole() && !damage => Some("the report calls it whole"),
            _ => None,
        };
        let words: Vec<_> =
            false_claim.map(|text| format!("FALSE REPORT: {text}")).into_iter().chain(trouble).collect();
        let got = line.split_whitespace().next().unwrap_or(if claim.fate.is_empty() {
            "nothing"
        } else {
            &claim.fate
        });
        let good = words.is_empty();
        let notable = claim.reasons.iter().filter(|(code, _)| !OF_ALL.contains(&code.as_str()));
        let losses = || notable.map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("; ");
        let reason = if good { losses() } else { words.join("; ") };
        let cases = String::new();
        Self { name: survivor.name, kind: survivor.kind, expected, got: got.to_owned(), reason, good, cases }
    }
}

fn why_not(line: &str, claim: &Claim) -> String {
    match line.split_once(": ") {
        Some((_, why)) if claim.whole() => why.to_owned(),
        Some((_, why)) => format!("{why} ({claim})"),
        None => claim.to_string(),
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.good { ' ' } else { '!' };
        let row = format!(
            "{mark} {:32} {:12} {:9} {:11} {}",
            self.name, self.kind, self.expected, self.got, self.reason
        );
        f.write_str(row.trim_end())
    }
}

fn tell(rows: &[Row]) {
    ui::line(format!("  {:32} {:12} {:9} {:11} reason", "name", "kind", "expected", "got"));
    for row in rows {
        match row.good {
            true => ui::line(row.to_string()),
            false => ui::failure(row.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(fate: &str, reason: &str) -> Claim {
        let reasons = (!reason.is_empty()).then(|| ("descriptor".to_owned(), reason.to_owned()));
        Claim { ppid: 1, fate: fate.into(), reasons: reasons.into_iter().collect() }
    }

    #[test]
    fn a_verdict_is_held_against_the_promise() {
        let survives = survivors::find("memory-small").unwrap();
        let judge = |line, claim, damage| Row::judge(survives, line, &claim, damage);
        assert!(judge("pass memory-small", claim("resurrected", ""), false).good);
        assert!(judge("pass memory-small", claim("resurrected-with-losses", "no affinity"), false).good);
        assert!(judge("", claim("given-up", "a socket"), false).reason.contains("a socket"));
        assert!(!judge("", Claim::default(), false).good);
        assert!(!judge("pass memory-small", claim("resurrected", ""), true).good);
        assert!(judge("fail memory-small: damaged", claim("resurrected", ""), true).good);
        let given_up = survivors::find("inet-established").unwrap();
        let judge = |line, claim| Row::judge(given_up, line, &claim, false);
        assert!(judge("", claim("given-up", "TCP connection from 127.0.0.1:1 to 127.0.0.1:2")).good);
        assert!(!judge("", claim("given-up", "a pipe")).good);
        assert!(!judge("", claim("resurrected", "")).good);
        assert!(
            !judge(
                "pass inet-established",
                claim("given-up", "TCP connection from 127.0.0.1:1 to 127.0.0.1:2")
            )
            .good
        );
    }

    #[test]
    fn a_report_that_claims_too_much_is_named() {
        let survivor = survivors::find("memory-small").unwrap();
        let judge = |line, claim| Row::judge(survivor, line, &claim, false);
        assert!(
            judge("fail memory-small: page 3", claim("resurrected", "")).reason.starts_with("FALSE REPORT")
        );
        assert!(judge("", claim("resurrected", "")).reason.starts_with("FALSE REPORT"));
        let control_group = Claim {
            ppid: 1,
            fate: "resurrected-with-losses".into(),
            reasons: vec![("cgroup".into(), String::new())],
        };
        assert!(judge("fail memory-small: page 3", control_group).reason.starts_with("FALSE REPORT"));
        assert!(judge("pass memory-small", claim("given-up", "x")).reason.starts_with("FALSE REPORT"));
        assert!(
            !judge("fail memory-small: page 3", claim("resurrected-with-losses", "x"))
                .reason
                .contains("FALSE")
        );
    }

    #[test]
    fn the_report_is_read() {
        let report = serde_json::json!({ "processes": [
            { "pid": 7, "ppid": 1, "fate": "given-up", "reasons": [{ "code": "descriptor", "text": "a socket" }] },
            { "pid": 8, "ppid": 7, "fate": "resurrected", "reasons": [] },
            { "pid": 9, "ppid": 8, "fate": "failed", "reasons": [] },
            { "pid": 10, "ppid": 10, "fate": "resurrected", "reasons": [] },
        ]});
        let claims = claims(&report);
        assert_eq!(claims[&7], claim("given-up", "a socket"));
        assert!(claims[&8].lives() && !claims[&8].has("descriptor"));
        let fates = |pid| descendants(&claims, pid).into_iter().map(|claim| claim.fate).collect::<Vec<_>>();
        assert_eq!(fates(7), ["resurrected", "failed"]);
        assert_eq!((fates(9), fates(10)), (vec![], vec![]), "nobody is his own child");
    }

    #[test]
    fn names_mean_what_they_say() {
        let names = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.into()).collect();
            choose(&words).map(|chosen| chosen.iter().map(|survivor| survivor.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["fpu-loop"]).unwrap(), ["fpu-loop"]);
        assert_eq!(names(&["fpu"]).unwrap(), ["fpu-sleep", "fpu-loop"]);
        assert_eq!(names(&["syscall-clock-nanosleep"]).unwrap(), ["syscall-clock-nanosleep"]);
        let alone = TABLE.iter().filter(|survivor| survivor.needs == Needs::Alone).count();
        assert_eq!(names(&[]).unwrap().len(), TABLE.len() - alone);
        assert_eq!(names(&["files"]).unwrap(), FILES);
        assert!(names(&["no-such"]).is_err());
    }
}
