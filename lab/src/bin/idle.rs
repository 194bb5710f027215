//! An init that does nothing: how long a crash kernel needs to get here is the floor for everything that is done in it.

fn main() {
    println!("lab-idle: init");
    // The end of PID 1 would be a panic.
    loop {
        std::thread::park();
    }
}
