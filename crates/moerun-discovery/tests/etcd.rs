//! Election, plan and epoch against a real etcd server.
#![cfg(feature = "etcd")]
// A test's own helpers may fail as loudly as a test.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use moerun_discovery::{
    SourceSpec,
    etcd::{Etcd, EtcdError, Leadership, PublishedPlan, publish_plan, stand, watch_plan},
};
use moerun_tests::EtcdServer;
use moerun_transport::ClientProtection;
use tokio::{sync::watch, task::JoinHandle, time::timeout};

const BOUND: Duration = Duration::from_secs(30);

fn etcd(server: &EtcdServer) -> Etcd {
    match format!("etcd:{}/test", server.address).parse() {
        Ok(SourceSpec::Etcd(spec)) => Etcd::new(spec, ClientProtection::LoopbackOnly),
        other => panic!("no etcd: {other:?}"),
    }
}

/// Somebody who stands for election.
fn candidate(server: &EtcdServer, name: &str) -> (JoinHandle<()>, watch::Receiver<Option<Leadership>>) {
    let (lead, leading) = watch::channel(None);
    (tokio::spawn(stand(etcd(server), name.to_owned(), lead)), leading)
}

async fn elected(leading: &mut watch::Receiver<Option<Leadership>>) -> Leadership {
    let leadership = timeout(BOUND, leading.wait_for(Option::is_some))
        .await
        .expect("elected in time");
    leadership.unwrap().clone().unwrap()
}

fn plan(epoch: u64) -> PublishedPlan {
    PublishedPlan {
        epoch,
        plan: format!("plan {epoch}").into_bytes(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_leader_publishes_only_newer_plans_and_all_see_them() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut server) = EtcdServer::start(folder.path()) else {
        return;
    };
    let (publish, mut plans) = watch::channel(None);
    tokio::spawn(watch_plan(etcd(&server), publish));
    let (first, mut first_leads) = candidate(&server, "first");
    let leadership = elected(&mut first_leads).await;
    let (_second, mut second_leads) = candidate(&server, "second");

    let etcd = etcd(&server);
    publish_plan(&etcd, &leadership, &plan(1)).await.unwrap();
    publish_plan(&etcd, &leadership, &plan(7)).await.unwrap();
    timeout(BOUND, plans.wait_for(|it| *it == Some(plan(7))))
        .await
        .expect("seen in time")
        .unwrap();
    for stale in [7, 3] {
        let error = publish_plan(&etcd, &leadership, &plan(stale)).await.unwrap_err();
        assert_eq!(
            error,
            EtcdError::StaleEpoch {
                present: 7,
                found: stale
            }
        );
    }
    let large = PublishedPlan {
        epoch: 8,
        plan: vec![b'x'; 2 << 20],
    };
    let error = publish_plan(&etcd, &leadership, &large).await.unwrap_err();
    assert!(matches!(error, EtcdError::TooLarge { .. }), "{error}");

    // The leader is gone without a word: another leads once its lease is over, and the first one's word counts no more.
    assert!(second_leads.borrow().is_none());
    first.abort();
    let next = elected(&mut second_leads).await;
    let error = publish_plan(&etcd, &leadership, &plan(8)).await.unwrap_err();
    assert_eq!(error, EtcdError::NotLeader);
    publish_plan(&etcd, &next, &plan(8)).await.unwrap();
    timeout(BOUND, plans.wait_for(|it| *it == Some(plan(8))))
        .await
        .expect("seen in time")
        .unwrap();

    // While etcd is down nobody leads and the plan stays; afterwards somebody leads again.
    server.kill();
    timeout(BOUND, second_leads.wait_for(Option::is_none))
        .await
        .expect("deposed in time")
        .unwrap();
    assert_eq!(*plans.borrow(), Some(plan(8)));
    assert!(publish_plan(&etcd, &next, &plan(9)).await.is_err());
    server.restart();
    let again = elected(&mut second_leads).await;
    publish_plan(&etcd, &again, &plan(9)).await.unwrap();
    timeout(BOUND, plans.wait_for(|it| *it == Some(plan(9))))
        .await
        .expect("seen in time")
        .unwrap();
}
