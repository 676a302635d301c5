//! Which process something belongs to, and whether that process is gone for certain.
//!
//! In: this process, or what a document on a store says of another. Out: `gone`, which is said only of processes of this
//! machine since it was started: of others nothing is known but when they were heard of last.

use serde::{Deserialize, Serialize};

/// A process on some machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// The machine since it was started, and the process namespace: process ids compare only where both are equal. Empty where it
    /// cannot be told.
    pub machine: String,
    /// Its id.
    pub pid: u32,
    /// When it started, in the kernel's ticks; tells a later process with the same id apart.
    pub process_start: Option<u64>,
}

impl Process {
    /// This one.
    pub fn this() -> Self {
        let pid = std::process::id();
        Process { machine: machine(), pid, process_start: start_of(pid) }
    }

    /// Whether it has ended: it was a process of this machine, and there is none with its id and start.
    pub fn gone(&self) -> bool {
        if self.machine.is_empty() || self.machine != machine() {
            return false;
        }
        match start_of(self.pid) {
            None => true,
            start => self.process_start.is_some() && start != self.process_start,
        }
    }
}

fn machine() -> String {
    let boot = fs_err::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs_err::read_link("/proc/self/ns/pid").map(|p| p.display().to_string()).unwrap_or_default();
    match boot.trim().is_empty() || namespace.is_empty() {
        true => String::new(),
        false => format!("{} {namespace}", boot.trim()),
    }
}

/// Start of a living process; `None` where there is none (one that only waits to be reaped is none).
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows it is `state ppid ...`, the 20th of which is the start.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    match fields.first() {
        Some(&"Z" | &"X") | None => None,
        Some(_) => fields.get(19)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_of_this_machine_is_known_to_be_gone() {
        let this = Process::this();
        assert!(!this.gone());
        if this.machine.is_empty() {
            eprintln!("SKIPPED: this system does not tell its processes");
            return;
        }
        assert!(Process { pid: u32::MAX, ..this.clone() }.gone());
        assert!(Process { process_start: Some(1), ..this.clone() }.gone());
        assert!(!Process { pid: u32::MAX, machine: "elsewhere".into(), ..this }.gone());
        assert!(!Process::default().gone());
    }
}
