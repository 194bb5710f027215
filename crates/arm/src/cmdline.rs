//! The crash kernel's command line, derived from the running kernel's.

/// What the derivation needs to know beside the running command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// `loops_per_jiffy` of the running kernel: spares the crash kernel a calibration.
    pub lpj: Option<u64>,
    /// The running kernel trusts the TSC (it is the clock source): spares the crash kernel checking it against the other timers.
    pub tsc_reliable: bool,
    /// What the running kernel measured the TSC's frequency to be, in kHz.
    pub tsc_khz: Option<u64>,
    /// The running kernel found the timer's interrupt where the firmware says it is.
    pub timer_found: bool,
    /// Physical address of the register saver's header.
    pub saver: Option<u64>,
    /// How many kernels ago the machine was cold-booted, as the crash kernel will count.
    pub generation: u32,
    /// From the configuration; wins over everything else by coming last.
    pub extra: String,
}

/// x86's COMMAND_LINE_SIZE, minus what the kernel puts in front when it loads a crash kernel (`elfcorehdr=0x… `).
pub const MAX_LEN: usize = 2048 - 64;

/// Parameters of the running kernel that the crash kernel must not see, by what stands before the `=`.
const DROPPED: [(&str, &str); 35] = [
    ("BOOT_IMAGE", "names the boot loader's file"),
    ("initrd", "names the boot loader's file"),
    ("crashkernel", "the crash kernel has no memory to reserve"),
    ("elfcorehdr", "given anew by the kernel"),
    ("mem", "bounds memory at an address that may lie below the crash region"),
    ("memmap", "describes the whole machine's memory, not the region's"),
    ("hugepages", "would take all the memory there is"),
    ("hugepagesz", "goes with hugepages"),
    ("default_hugepagesz", "goes with hugepages"),
    ("hugetlb_cma", "would take all the memory there is"),
    ("cma", "would take all the memory there is"),
    ("log_buf_len", "costs memory"),
    ("trace_buf_size", "costs memory"),
    ("ftrace", "costs memory and time"),
    ("slub_debug", "costs memory and time"),
    ("page_owner", "costs memory"),
    ("kmemleak", "costs memory"),
    ("maxcpus", "set below"),
    ("nr_cpus", "would keep the other CPUs out for good"),
    ("possible_cpus", "would keep the other CPUs out for good"),
    ("isolcpus", "there is one CPU"),
    ("nohz_full", "there is one CPU"),
    ("rcu_nocbs", "there is one CPU"),
    ("resume", "a hibernation image has no place here"),
    ("init", "the initramfs has its own"),
    ("rdinit", "the initramfs has its own"),
    ("panic", "set below"),
    ("reset_devices", "set below"),
    ("quiet", "set below"),
    ("lpj", "set below"),
    ("cryptomgr.notests", "set below"),
    ("tsc", "set below"),
    ("tsc_early_khz", "set below"),
    ("otherworld.saver", "set below"),
    ("otherworld.generation", "set below"),
];

/// Derives the crash kernel's command line from `running` (`/proc/cmdline`).
///
/// Kept is whatever is not in the list of dropped parameters: consoles, `root=`, device quirks, and the administrator's choice of
/// `mitigations=`, since programs go on running under this kernel. Added are:
///
/// - `maxcpus=1`: boots on the CPU that panicked; the others can be brought up later (`nr_cpus=1` would forbid that);
/// - `reset_devices`: drivers reset their device first, which the dead kernel left in the middle of its work;
/// - `panic=10`: if the crash kernel dies too, the machine reboots;
/// - `quiet`: a serial console is slow;
/// - `cryptomgr.notests`: no self-tests of the cipher implementations, 0.1 s and more;
/// - `lpj=`, `tsc=reliable` and `tsc_early_khz=`: no calibration, where the running kernel knows. One that is disturbed (by a busy
///   host) makes time run many times too fast, and with `tsc=reliable` no watchdog notices: all deadlines would be over at once;
/// - `no_timer_check`, where the running kernel's check succeeded: it waits for ten ticks, and on a virtual machine whose host is
///   busy it may wait in vain, which the kernel takes for broken hardware and panics;
/// - `otherworld.saver=` and `otherworld.generation=`: for our own init.
///
/// `irqpoll` is not added: kdump needed it for controllers with stuck interrupts long ago, and it costs at every interrupt.
pub fn derive(running: &str, facts: &Facts) -> String {
    let keep = |word: &&str| {
        let key = word.split_once('=').map_or(*word, |(key, _)| key);
        let key = key.replace('-', "_");
        !DROPPED.iter().any(|(dropped, _)| dropped.replace('-', "_") == key)
    };
    let words = split(running);
    // What comes after a bare `--` is for the running kernel's init.
    let ours = words.iter().map(String::as_str).take_while(|w| *w != "--");
    let mut out: Vec<String> = ours.filter(keep).map(str::to_owned).collect();
    out.extend(["maxcpus=1", "reset_devices", "panic=10", "quiet", "cryptomgr.notests"].map(str::to_owned));
    out.extend(facts.lpj.map(|lpj| format!("lpj={lpj}")));
    out.extend(facts.tsc_reliable.then(|| "tsc=reliable".to_owned()));
    out.extend(facts.tsc_khz.map(|khz| format!("tsc_early_khz={khz}")));
    if facts.timer_found && !words.iter().any(|w| w == "no_timer_check") {
        out.push("no_timer_check".to_owned());
    }
    out.extend(facts.saver.map(|phys| format!("otherworld.saver={phys:#x}")));
    out.push(format!("otherworld.generation={}", facts.generation));
    out.extend(split(&facts.extra));
    out.join(" ")
}

/// Splits at spaces outside double quotes, as the kernel does (lib/cmdline.c, `next_arg`).
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in text.trim().chars() {
        quoted ^= c == '"';
        if c.is_whitespace() && !quoted {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(c);
        }
    }
    words.retain(|w| !w.is_empty());
    words
}

/// The value of `key` on a command line; the last one, as most of the kernel's parsers have it.
pub fn value<'a>(cmdline: &'a str, key: &str) -> Option<&'a str> {
    cmdline.split_whitespace().rev().find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
}

/// `loops_per_jiffy` from the kernel log: `Calibrating delay loop … (lpj=4800000)`.
pub fn lpj_from_log(log: &str) -> Option<u64> {
    let rest = &log[log.find("(lpj=")? + "(lpj=".len()..];
    rest.split(')').next()?.parse().ok()
}

/// The TSC's frequency in kHz from the kernel log (arch/x86/kernel/tsc.c): refined against another clock if it was, else as detected
/// at boot. None if the kernel found later that another clock disagrees.
pub fn tsc_khz_from_log(log: &str) -> Option<u64> {
    if log.contains("Marking TSC unstable due to clocksource watchdog") {
        return None;
    }
    let after = |words: &str| log.split_once(words)?.1.split_once(" MHz")?.0.trim().parse::<f64>().ok();
    let mhz = after("tsc: Refined TSC clocksource calibration:").or_else(|| after("tsc: Detected"))?;
    (mhz > 1.0).then_some((mhz * 1000.0).round() as u64)
}

/// Whether the kernel's check of the timer's interrupt (arch/x86/kernel/apic/io_apic.c, `check_timer`) succeeded at once. `false`
/// also when the log no longer reaches back to the boot.
pub fn timer_found(log: &str) -> bool {
    log.contains("Linux version ") && !log.contains("timer not connected to IO-APIC")
}

/// `loops_per_jiffy` from `/proc/cpuinfo`'s `bogomips` (lpj × HZ / 500 000, two decimals) and CONFIG_HZ.
pub fn lpj_from_bogomips(cpuinfo: &str, hz: u64) -> Option<u64> {
    let line = cpuinfo.lines().find(|l| l.starts_with("bogomips"))?;
    let bogomips: f64 = line.split_once(':')?.1.trim().parse().ok()?;
    let lpj = bogomips * 500_000.0 / hz.max(1) as f64;
    (lpj >= 1000.0).then_some(lpj.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_and_root_stay_and_the_reservation_goes() {
        let running = "BOOT_IMAGE=/boot/vmlinuz-6.1 root=UUID=1-2 ro console=tty0 console=ttyS0,115200 quiet \
                       crashkernel=512M mitigations=auto dyndbg=\"file a.c +p\" hugepages=512 -- single";
        let facts = Facts { lpj: Some(4_800_000), generation: 1, ..Facts::default() };
        assert_eq!(
            derive(running, &facts),
            "root=UUID=1-2 ro console=tty0 console=ttyS0,115200 mitigations=auto dyndbg=\"file a.c +p\" \
             maxcpus=1 reset_devices panic=10 quiet cryptomgr.notests lpj=4800000 otherworld.generation=1"
        );
    }

    #[test]
    fn deriving_again_changes_nothing_but_the_generation() {
        let facts = Facts {
            saver: Some(0x1_2345_6000),
            tsc_reliable: true,
            tsc_khz: None,
            generation: 1,
            extra: "mitigations=off".into(),
            ..Facts::default()
        };
        let first = derive("root=/dev/vda console=ttyS0", &facts);
        assert!(
            first.ends_with(
                "tsc=reliable otherworld.saver=0x123456000 otherworld.generation=1 mitigations=off"
            )
        );
        let second = derive(&first, &Facts { extra: String::new(), generation: 2, ..facts });
        assert_eq!(second.matches("maxcpus=1").count(), 1);
        assert_eq!(value(&second, "otherworld.generation"), Some("2"));
        assert_eq!(value(&second, "root"), Some("/dev/vda"));
        assert_eq!(value(&second, "roo"), None);
    }

    #[test]
    fn the_timer_check_is_left_out_only_where_it_has_succeeded() {
        assert!(timer_found("[0.0] Linux version 6.1\n[0.1] x\n"));
        assert!(!timer_found(
            "[0.0] Linux version 6.1\n[0.1] ..MP-BIOS bug: 8254 timer not connected to IO-APIC\n"
        ));
        assert!(!timer_found("[9.0] the beginning has been overwritten\n"));
        let facts = Facts { timer_found: true, generation: 1, ..Facts::default() };
        assert!(
            derive("quiet", &facts).ends_with("cryptomgr.notests no_timer_check otherworld.generation=1")
        );
        assert_eq!(
            derive("no_timer_check", &facts).matches("no_timer_check").count(),
            1,
            "the administrator's stays"
        );
        assert!(!derive("quiet", &Facts::default()).contains("no_timer_check"));
    }

    #[test]
    fn the_tsc_frequency_is_found_unless_it_was_refuted() {
        let detected = "tsc: Detected 2596.150 MHz processor\n";
        let refined = "tsc: Refined TSC clocksource calibration: 2596.147 MHz\n";
        assert_eq!(tsc_khz_from_log(detected), Some(2_596_150));
        assert_eq!(tsc_khz_from_log(&format!("{detected}{refined}")), Some(2_596_147));
        let refuted = "tsc: Marking TSC unstable due to clocksource watchdog\n";
        assert_eq!(tsc_khz_from_log(&format!("{detected}{refuted}")), None);
        assert_eq!(tsc_khz_from_log("nothing"), None);
        let facts = Facts { tsc_khz: Some(5), generation: 1, ..Facts::default() };
        assert!(
            derive("tsc_early_khz=9", &facts)
                .ends_with("cryptomgr.notests tsc_early_khz=5 otherworld.generation=1")
        );
    }

    #[test]
    fn loops_per_jiffy_are_found() {
        let log = "tsc: x\nCalibrating delay loop (skipped), value calculated using timer frequency.. 5200.00 BogoMIPS (lpj=10400000)\n";
        assert_eq!(lpj_from_log(log), Some(10_400_000));
        assert_eq!(lpj_from_log("nothing"), None);
        assert_eq!(lpj_from_bogomips("processor\t: 0\nbogomips\t: 5200.00\n", 250), Some(10_400_000));
        assert_eq!(lpj_from_bogomips("bogomips\t: 0.00\n", 250), None);
    }
}
