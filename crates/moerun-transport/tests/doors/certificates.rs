//! Who is let in, who is turned away, and what each side says.

use std::{
    net::TcpListener,
    sync::{Arc, Mutex, PoisonError},
};

use moerun_testkit::{Authority, Validity};
use moerun_transport::{
    AllowList, ClientFiles, ClientProtection, ClientTls, ConnectionLimits, Refusal, ServerFiles, ServerProtection,
    ServerTls, TransportError,
};

use crate::door::{Door, Setting, knock};

const GATEWAY: &str = "spiffe://cluster/ns/moerun/sa/gateway";

fn tls(client: ClientTls) -> ClientProtection {
    ClientProtection::Tls(Arc::new(client))
}

fn by_peer(refusal: Refusal, word: &str) {
    assert!(matches!(refusal, Refusal::ByPeer(_)), "{refusal:?}");
    assert!(refusal.to_string().contains(word), "{refusal}");
}

#[tokio::test]
async fn both_ends_with_certificates_of_one_authority_understand_each_other() {
    let setting = Setting::new();
    let worker = setting
        .authority
        .issue("worker", &["127.0.0.1", "worker-0.moerun"], Validity::Now);
    let gateway = setting.authority.issue("gateway", &[GATEWAY], Validity::Now);
    let door = Door::with_tls(setting.server(worker, &["other.gateway", GATEWAY])).await;
    let address = door.address.to_string();
    // By the address that was dialled, and by who it is.
    knock(&address, tls(setting.client(Some(gateway.clone()), &[])))
        .await
        .ok();
    knock(&address, tls(setting.client(Some(gateway), &["worker-0.moerun"])))
        .await
        .ok();
}

#[tokio::test]
async fn a_worker_turns_away_every_gateway_that_is_not_vouched_for() {
    let setting = Setting::new();
    let strangers = tempfile::tempdir().unwrap();
    let stranger = Authority::create(strangers.path());
    let worker = setting.authority.issue("worker", &["127.0.0.1"], Validity::Now);
    let door = Door::with_tls(setting.server(worker, &[GATEWAY])).await;
    let address = door.address.to_string();
    let log = Log::start();
    let client = |own| {
        // Read before it is used: an end does not start with a certificate that is not valid, so it is made bad afterwards.
        tls(setting.client(own, &[]))
    };
    let foreign = stranger.issue("gateway", &[GATEWAY], Validity::Now);
    by_peer(knock(&address, client(Some(foreign))).await.refusal(), "--tls-ca");
    log.has("signed by none of our authorities");
    let alone = setting.authority.issue_self_signed("alone", &[GATEWAY]);
    by_peer(knock(&address, client(Some(alone))).await.refusal(), "--tls-ca");
    let other = setting
        .authority
        .issue("other", &["spiffe://cluster/ns/moerun/sa/other"], Validity::Now);
    by_peer(knock(&address, client(Some(other))).await.refusal(), "--allow-peer");
    log.has("its certificate is of spiffe://cluster/ns/moerun/sa/other, which --allow-peer does not name");
    let nameless = setting.authority.issue("nameless", &[], Validity::Now);
    by_peer(knock(&address, client(Some(nameless))).await.refusal(), "--allow-peer");
    by_peer(knock(&address, client(None)).await.refusal(), "there is none");
    log.has("it shows no certificate");
    let gateway = setting.authority.issue("gateway", &[GATEWAY], Validity::Now);
    knock(&address, client(Some(gateway))).await.ok();
}

#[tokio::test]
async fn a_gateway_turns_away_every_worker_that_is_not_vouched_for() {
    let setting = Setting::new();
    let strangers = tempfile::tempdir().unwrap();
    let stranger = Authority::create(strangers.path());
    let gateway = setting.authority.issue("gateway", &[GATEWAY], Validity::Now);
    let refusal = async |pair, allowed: &[&str]| {
        let door = Door::with_tls(setting.server(pair, &[])).await;
        let client = setting.client(Some(gateway.clone()), allowed);
        knock(&door.address.to_string(), tls(client)).await.refusal()
    };
    let here = ["127.0.0.1"];
    let foreign = refusal(stranger.issue("worker", &here, Validity::Now), &[]).await;
    assert_eq!(foreign, Refusal::UnknownAuthority);
    let alone = refusal(setting.authority.issue_self_signed("alone", &here), &[]).await;
    assert_eq!(alone, Refusal::UnknownAuthority);
    let elsewhere = refusal(setting.authority.issue("elsewhere", &["worker-1"], Validity::Now), &[]).await;
    assert!(
        matches!(&elsewhere, Refusal::WrongName { wanted, presented } if wanted == "127.0.0.1" && presented.contains("worker-1")),
        "{elsewhere:?}"
    );
    let not_listed = refusal(
        setting.authority.issue("worker", &here, Validity::Now),
        &["worker-0.moerun"],
    )
    .await;
    assert!(
        matches!(&not_listed, Refusal::NotAllowed { allowed, .. } if allowed == "worker-0.moerun"),
        "{not_listed:?}"
    );
}

/// A certificate can run out after it was read: here that of the one end, judged by the other.
#[tokio::test]
async fn certificates_out_of_time_are_refused_by_the_other_end_and_at_start() {
    let setting = Setting::new();
    for (validity, word) in [
        (Validity::Past, "expired 60 min ago"),
        (Validity::Future, "becomes valid in"),
    ] {
        let (cert, key) = setting.authority.issue("late", &["127.0.0.1"], validity);
        let files = ServerFiles {
            cert,
            key,
            client_ca: None,
        };
        let error = ServerTls::load(files, AllowList::default()).unwrap_err().to_string();
        assert!(
            error.contains("late.pem") && error.contains(word) && error.contains("clock"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn plaintext_and_tls_do_not_mix_and_say_so() {
    let setting = Setting::new();
    let worker = setting.authority.issue("worker", &["127.0.0.1"], Validity::Now);
    let log = Log::start();
    let door = Door::with_tls(setting.server(worker, &[])).await;
    let outcome = knock(&door.address.to_string(), ClientProtection::LoopbackOnly).await;
    assert_eq!(outcome.refusal(), Refusal::PeerWantsTls);
    log.has("it speaks plaintext, and TLS is wanted here");

    let plain = Door::open(ServerProtection::LoopbackOnly, ConnectionLimits::default()).await;
    let gateway = setting.authority.issue("gateway", &[GATEWAY], Validity::Now);
    let outcome = knock(&plain.address.to_string(), tls(setting.client(Some(gateway), &[]))).await;
    assert_eq!(outcome.refusal(), Refusal::PeerIsPlain);
    log.has("it speaks TLS, and this door is plaintext");
}

#[tokio::test]
async fn plaintext_is_not_dialled_beyond_this_host() {
    // Nothing listens there, and nothing is sent: the address alone is refused.
    let outcome = knock("192.0.2.1:50061", ClientProtection::LoopbackOnly).await;
    let refusal = outcome.refusal();
    assert!(matches!(refusal, Refusal::Plaintext(_)), "{refusal:?}");
    let text = refusal.to_string();
    assert!(
        text.contains("192.0.2.1") && text.contains("--insecure") && text.contains("--tls-ca"),
        "{text}"
    );
    // What is not there is no refusal.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let outcome = knock(&closed.to_string(), ClientProtection::LoopbackOnly).await;
    assert_eq!((outcome.error.is_some(), outcome.refusal), (true, None));
}

#[test]
fn files_that_do_not_fit_are_named() {
    let setting = Setting::new();
    let (cert, key) = setting.authority.issue("a", &["a"], Validity::Now);
    let (_, other_key) = setting.authority.issue("b", &["b"], Validity::Now);
    let load = |cert: &std::path::Path, key: &std::path::Path| {
        let files = ServerFiles {
            cert: cert.to_owned(),
            key: key.to_owned(),
            client_ca: None,
        };
        ServerTls::load(files, AllowList::default())
    };
    load(&cert, &key).unwrap();
    let error = load(&cert, &other_key).unwrap_err();
    assert!(matches!(&error, TransportError::NotAPair { .. }), "{error}");
    assert!(error.to_string().contains("b.key"), "{error}");
    let error = load(&key, &key).unwrap_err().to_string();
    assert!(
        error.contains("a.key: wanted a certificate in PEM, found none"),
        "{error}"
    );
    let error = load(&cert, &cert).unwrap_err().to_string();
    assert!(error.contains("a.pem: wanted a private key in PEM"), "{error}");
    let absent = ClientFiles {
        ca: "/nowhere/ca.pem".into(),
        own: None,
    };
    let error = ClientTls::load(absent, AllowList::default()).unwrap_err();
    assert!(matches!(&error, TransportError::Read { .. }), "{error}");
}

/// What this process logs from now on, on the thread of the test.
struct Log {
    lines: Arc<Mutex<Vec<u8>>>,
    _guard: tracing::subscriber::DefaultGuard,
}

impl Log {
    fn start() -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let writer = Writer(Arc::clone(&lines));
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        Self {
            lines,
            _guard: tracing::subscriber::set_default(subscriber),
        }
    }

    #[track_caller]
    fn has(&self, words: &str) {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&lines);
        assert!(text.contains(words), "{words:?} is not in: {text}");
    }
}

#[derive(Clone)]
struct Writer(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
