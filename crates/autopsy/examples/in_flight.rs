//! How the threads of a dead machine go on: `cargo run --example in_flight -- CORE`.

fn main() -> anyhow::Result<()> {
    let core = std::env::args().nth(1).unwrap_or_else(|| "/proc/vmcore".into());
    let kernel = ktypes::Kernel::open(vmcore::Vmcore::open(core.as_ref())?)?;
    let snapshot = autopsy::autopsy(&kernel)?;
    for process in &snapshot.processes {
        for thread in &process.threads {
            let call = match thread.syscall {
                Some(call) => {
                    let name =
                        autopsy::syscall_name(call.nr).map_or_else(|| call.nr.to_string(), str::to_owned);
                    let args: Vec<String> = call.args.iter().map(|arg| format!("{arg:x}")).collect();
                    format!("{name}({})", args.join(", "))
                }
                None => "-".to_owned(),
            };
            println!(
                "{:7} {:7} {:15} {:?} {call} {:?}",
                process.pid, thread.tid, thread.comm, thread.state, thread.resume
            );
        }
    }
    Ok(())
}
