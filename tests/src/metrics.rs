//! Reading a process' metrics.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

/// The page at `address`; empty while nobody listens there.
pub fn metrics_page(address: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return String::new();
    };
    let mut page = String::new();
    let asked = stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .and_then(|()| stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"))
        .and_then(|()| stream.read_to_string(&mut page));
    match asked {
        Ok(_) => page,
        Err(_) => String::new(),
    }
}

/// The sum of all figures of that name at `address`, or of those with exactly these labels if it has any; 0 if there is none.
pub fn metric(address: &str, name: &str) -> f64 {
    let page = metrics_page(address);
    let of_name = |line: &&str| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{'))
    };
    let values = page
        .lines()
        .filter(of_name)
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.sum()
}
