//! Moving experts: a new holder loads, the plan counts on it, the old one is asked no more, and then lets go.

use std::sync::Arc;

use moerun_proto::HeldExpert;
use moerun_routing::{merge_slices, subtract_slices};
use moerun_types::ExpertSlice;
use tokio::task::spawn_blocking;

use super::{WorkerMoves, control, request::slice_bytes};
use crate::{
    DispatchError,
    admission::{Contents, contents},
    held_watch::take_what_was_told,
    member::Member,
    membership::Shared,
};

/// Most bytes that one call asks a worker to load: what is there is used before the next is read.
const MAX_CALL_BYTES: u64 = 64 << 20;

/// What a worker is to hold.
#[derive(Debug, Clone)]
pub(super) struct Target {
    member: Arc<Member>,
    wanted: Vec<ExpertSlice>,
    owed: Vec<ExpertSlice>,
}

impl Target {
    /// `member` is to hold `wanted`, and nothing else.
    pub(super) fn new(member: Arc<Member>, wanted: Vec<ExpertSlice>) -> Self {
        Self {
            member,
            wanted: merge_slices(wanted),
            owed: Vec::new(),
        }
    }

    /// The same, but it lets go of nothing that is in `owed`, whose holders are not there yet.
    pub(super) fn owing(self, owed: &[ExpertSlice]) -> Self {
        Self {
            owed: owed.to_vec(),
            ..self
        }
    }

    /// What it does not hold yet.
    pub(super) fn missing(&self) -> Vec<ExpertSlice> {
        subtract_slices(&self.wanted, &self.member.held())
    }

    fn surplus(&self) -> Vec<ExpertSlice> {
        let surplus = subtract_slices(&self.member.held(), &self.wanted);
        subtract_slices(&surplus, &self.owed)
    }

    /// In numbers; `bytes` is what slices take.
    pub(super) fn moves(&self, bytes: &dyn Fn(&[ExpertSlice]) -> u64) -> WorkerMoves {
        let (missing, surplus) = (self.missing(), self.surplus());
        WorkerMoves {
            address: self.member.address().to_owned(),
            load_slices: missing.len(),
            load_bytes: bytes(&missing),
            unload_slices: surplus.len(),
            unload_bytes: bytes(&surplus),
        }
    }
}

/// Marks members whose changes are this gateway's; however it ends, they are asked for all that they hold.
struct Changing<'a> {
    shared: &'a Shared,
    members: Vec<Arc<Member>>,
}

impl<'a> Changing<'a> {
    fn begin(shared: &'a Shared, targets: &[Target]) -> Self {
        let members: Vec<Arc<Member>> = targets.iter().map(|target| Arc::clone(&target.member)).collect();
        members.iter().for_each(|member| member.set_changing(true));
        Self { shared, members }
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        for member in &self.members {
            member.set_changing(false);
            take_what_was_told(self.shared, member);
            if member.retire_nothing()
                && let Err(error) = self.shared.replan()
            {
                tracing::error!(worker = member.address(), "no plan without what it lets go: {error}");
            }
        }
    }
}

/// Makes each target's worker hold what it is to. A worker that has no room lets go first, of what the others hold already.
pub(super) async fn carry_out(shared: &Shared, targets: &[Target]) -> Result<(), DispatchError> {
    let _changing = Changing::begin(shared, targets);
    loop {
        let (mut progress, mut no_room) = (false, None);
        for target in targets {
            let announced: Vec<_> = shared
                .members()
                .iter()
                .filter_map(|member| member.announced())
                .collect();
            let contents = contents(announced.iter().map(|held| &held[..]));
            match load_missing(shared, target, &contents, &mut progress).await {
                Err(error @ DispatchError::NoRoom { .. }) => no_room = Some(error),
                outcome => outcome?,
            }
        }
        progress |= let_go(shared, targets).await?;
        match no_room {
            None => return Ok(()),
            Some(error) if !progress => return Err(error),
            Some(_) => {}
        }
    }
}

async fn load_missing(
    shared: &Shared,
    target: &Target,
    contents: &Contents,
    progress: &mut bool,
) -> Result<(), DispatchError> {
    let mut missing = target.missing();
    let mut most = usize::MAX;
    while !missing.is_empty() {
        let (count, holder) = one_call(shared, target, &missing, most);
        let mut call = Vec::with_capacity(count);
        for &slice in &missing[..count] {
            call.push(match contents.of(slice) {
                Some(known) => known,
                None => own_content(shared, slice).await?,
            });
        }
        match load(shared, &target.member, &call, &holder).await {
            Ok(()) => {
                *progress = true;
                missing.drain(..count);
            }
            // Perhaps there is room for some of it.
            Err(DispatchError::NoRoom { .. }) if count > 1 => most = count / 2,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What nobody has announced is known if this process has it too.
async fn own_content(shared: &Shared, slice: ExpertSlice) -> Result<HeldExpert, DispatchError> {
    let admission = Arc::clone(&shared.core.admission);
    let hashing = spawn_blocking(move || admission.own_content(slice)).await;
    let own = hashing.map_err(|error| DispatchError::OwnCheckpoint {
        reason: error.to_string(),
    })?;
    own?.ok_or(DispatchError::UnknownContent { slice })
}

/// How many of `missing` one call asks for, all of which one other member could hand over, and which.
fn one_call(shared: &Shared, target: &Target, missing: &[ExpertSlice], most: usize) -> (usize, String) {
    let admission = &shared.core.admission;
    let holders: Vec<(Arc<Member>, Vec<ExpertSlice>)> = shared
        .members()
        .into_iter()
        .filter(|member| member.link.is_up() && !Arc::ptr_eq(member, &target.member))
        .map(|member| (Arc::clone(&member), member.held()))
        .collect();
    let has = |held: &[ExpertSlice], slice: &ExpertSlice| subtract_slices(&[*slice], held).is_empty();
    let holder = holders.iter().find(|(_, held)| has(held, &missing[0]));
    let mut bytes = 0u64;
    let fits = |slice: &&ExpertSlice| {
        bytes += slice_bytes(admission.config(), &admission.numerics(), **slice);
        bytes <= MAX_CALL_BYTES && holder.is_none_or(|(_, held)| has(held, slice))
    };
    let count = missing.iter().take(most).take_while(fits).count().max(1);
    let address = holder.map_or_else(String::new, |(member, _)| member.address().to_owned());
    (count, address)
}

/// Loads slices into one worker, asks it for one of them, and plans with them.
async fn load(shared: &Shared, member: &Arc<Member>, slices: &[HeldExpert], holder: &str) -> Result<(), DispatchError> {
    let limits = shared.core.admission.limits();
    let now = control::load(member, limits, slices, holder).await?;
    if let Err(error) = shared.canary.check(&shared.core, member, slices[0].slice).await {
        let named: Vec<ExpertSlice> = slices.iter().map(|held| held.slice).collect();
        if let Ok(without) = control::unload(member, limits, &named).await {
            member.tells(without);
        }
        return Err(error);
    }
    shared.take(member, &now.held)?;
    member.tells(now);
    Ok(())
}

/// Lets workers go of what they are not to hold, as far as all who are to hold it do. Whether anything went.
async fn let_go(shared: &Shared, targets: &[Target]) -> Result<bool, DispatchError> {
    let owed: Vec<ExpertSlice> = targets
        .iter()
        .flat_map(|target| match target.member.link.is_up() {
            true => target.missing(),
            false => target.wanted.clone(),
        })
        .collect();
    let mut going = Vec::new();
    for target in targets {
        let slices = subtract_slices(&target.surplus(), &owed);
        if !slices.is_empty() {
            target.member.retire(&slices);
            going.push((&target.member, slices));
        }
    }
    if going.is_empty() {
        return Ok(false);
    }
    shared.replan()?;
    shared.older_plans_ended().await;
    for (member, slices) in going {
        let now = control::unload(member, shared.core.admission.limits(), &slices).await?;
        shared.take(member, &now.held)?;
        member.tells(now);
        member.retire_nothing();
    }
    Ok(true)
}
