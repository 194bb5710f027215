//! `inspect sockets`

use autopsy::SocketSummary;

/// The first column of ss(8).
fn family(socket: &SocketSummary) -> String {
    let six = if socket.family == "inet6" { "6" } else { "" };
    match (socket.family.as_str(), socket.protocol.as_str()) {
        ("inet" | "inet6", protocol) if protocol.parse::<u16>().is_err() => format!("{protocol}{six}"),
        ("inet" | "inet6", protocol) => format!("{}{six}:{protocol}", socket.kind),
        ("unix", _) => format!("unix {}", socket.kind),
        (family, "") => family.to_owned(),
        (family, protocol) => format!("{family}:{protocol}"),
    }
}

pub fn text(sockets: &[SocketSummary]) -> String {
    let rows = sockets.iter().map(|s| {
        let holders: Vec<String> =
            s.holders.iter().map(|h| format!("{}/{} ({})", h.pid, h.fd, h.comm)).collect();
        let end = |address: &String| if address.is_empty() { "*".to_owned() } else { address.clone() };
        let mut who = holders.join(", ");
        if let Some(number) = s.net_namespace {
            who.push_str(&format!(" net:[{number}]"));
        }
        [
            family(s),
            s.state.clone(),
            s.receive_queue.to_string(),
            s.send_queue.to_string(),
            end(&s.local),
            end(&s.peer),
            s.inode.to_string(),
            who,
        ]
    });
    let header = ["SOCKET", "STATE", "RECV-Q", "SEND-Q", "LOCAL", "PEER", "INODE", "PID/DESCRIPTOR"];
    super::table(&header, &[2, 3, 6], rows)
}
