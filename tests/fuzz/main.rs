//! Row 27 of the fault matrix: files and messages that are nearly right, for every parser. Each may be refused or taken, but
//! must neither panic, nor take a second, nor ask for much memory.
//!
//! A target gets the valid inputs it is made of and the files in `corpus/TARGET`, then changes of them, for
//! `MOERUN_FUZZ_SECONDS` (1 unless told otherwise), from `MOERUN_FUZZ_SEED` on. Arguments choose targets by name. An input
//! that fails is kept in the target folder, and `MOERUN_FUZZ_INPUT=FILE` runs it alone.

mod files;
mod frames;
mod messages;
mod mutate;
mod requests;

use std::{
    alloc::System,
    fs,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{ExitCode, exit},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

use mutate::Form;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Longest that an input may take.
const LONGEST: Duration = Duration::from_secs(1);
/// What takes as long hangs: the process ends.
const HANGS: Duration = Duration::from_secs(20);
/// Bytes that an input may make its parser ask for, all its requests together, beside a multiple of its own.
const MOST_BYTES: usize = 256 << 20;
const MOST_TIMES_INPUT: usize = 256;

type Parse = Box<dyn FnMut(&[u8])>;

/// A parser and what it is given.
struct Target {
    name: &'static str,
    /// How its inputs are built, and so changed.
    form: Form,
    /// Valid inputs.
    inputs: Vec<Vec<u8>>,
    parse: Parse,
}

impl Target {
    fn new(name: &'static str, form: Form, inputs: Vec<Vec<u8>>, parse: impl FnMut(&[u8]) + 'static) -> Self {
        let parse = Box::new(parse);
        Self {
            name,
            form,
            inputs,
            parse,
        }
    }
}

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if std::env::args().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS; // nothing that a test runner could run one by one
    }
    let watch = Watch::start();
    let mut run = 0;
    for make in [files::targets, messages::targets, requests::targets, frames::targets] {
        for target in make() {
            if wanted.is_empty() || wanted.iter().any(|word| target.name.contains(word.as_str())) {
                fuzz(target, &watch);
                run += 1;
            }
        }
    }
    println!("test result: ok. {run} passed; 0 failed; fuzz targets");
    ExitCode::SUCCESS
}

/// Runs one target for the time there is; ends the process where it fails.
fn fuzz(mut target: Target, watch: &Watch) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Ok(file) = std::env::var("MOERUN_FUZZ_INPUT") {
        let input = fs::read(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        run(&mut target, &input, watch);
        return println!("{}: {file} is taken or refused", target.name);
    }
    let kept = corpus(target.name);
    let (num_kept, mut seeds) = (kept.len(), target.inputs.clone());
    seeds.extend(kept);
    for input in &seeds {
        run(&mut target, input, watch); // as they are, past crashes included
    }
    let seconds = Duration::from_secs(number("MOERUN_FUZZ_SECONDS").unwrap_or(1));
    let first = number("MOERUN_FUZZ_SEED").unwrap_or(0);
    let (begun, mut executions, mut longest, mut most_bytes) = (Instant::now(), 0u64, Duration::ZERO, 0);
    while begun.elapsed() < seconds {
        let mut rng = ChaCha8Rng::seed_from_u64(first + executions);
        let seed = &seeds[rng.random_range(0..seeds.len())];
        let input = target.form.mutate(seed, &mut rng);
        let (took, bytes) = run(&mut target, &input, watch);
        (longest, most_bytes) = (longest.max(took), most_bytes.max(bytes));
        executions += 1;
    }
    figure(&format!(
        "{}: {executions} mutations of {} inputs ({num_kept} kept), no panic got out, longest {:.1} ms, most asked for {:.1} MiB",
        target.name,
        seeds.len(),
        longest.as_secs_f64() * 1e3,
        most_bytes as f64 / f64::from(1 << 20)
    ));
}

/// Gives one input to the parser; returns how long it took and how many bytes were asked for.
fn run(target: &mut Target, input: &[u8], watch: &Watch) -> (Duration, usize) {
    let mut measured = measure(target, input, watch);
    if measured.0 >= LONGEST {
        measured = measure(target, input, watch); // the host may have been busy with something else
    }
    let (took, bytes) = measured;
    if took >= LONGEST {
        fail(target.name, input, &format!("takes {took:?}"));
    }
    if bytes > MOST_BYTES + MOST_TIMES_INPUT * input.len() {
        fail(target.name, input, &format!("asks for {bytes} bytes"));
    }
    measured
}

fn measure(target: &mut Target, input: &[u8], watch: &Watch) -> (Duration, usize) {
    watch.begin(target.name, input);
    let (begun, region) = (Instant::now(), Region::new(ALLOCATOR));
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.parse)(input)));
    let measured = (begun.elapsed(), region.change().bytes_allocated);
    watch.end();
    if outcome.is_err() {
        fail(target.name, input, "panics");
    }
    measured
}

/// Keeps the input, says how to run it again, and ends the process.
fn fail(target: &str, input: &[u8], how: &str) -> ! {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{target}-{:016x}", hash(input)));
    let kept = fs::write(&file, input);
    let shown = String::from_utf8_lossy(&input[..input.len().min(1000)]);
    eprintln!(
        "{target}: an input of {} bytes {how}: {shown:?}\nkept: {kept:?}; again: MOERUN_FUZZ_INPUT={} cargo test --release -p \
         moerun-tests --test fuzz -- {target}",
        input.len(),
        file.display()
    );
    exit(1)
}

fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The files kept for a target, by name.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| fs::read(path).expect("a readable file"))
        .collect()
}

/// Prints a target's figure, and keeps it with those of the other rows.
fn figure(text: &str) {
    let line = format!("row 27: {text}\n");
    print!("{line}");
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault-matrix.txt");
    let file = fs::OpenOptions::new().create(true).append(true).open(file);
    file.and_then(|mut file| file.write_all(line.as_bytes()))
        .expect("the target folder is writable");
}

/// Ends the process when an input never comes back.
struct Watch {
    began: Instant,
    /// Milliseconds since then at which the present input began; 0 = there is none.
    since: Arc<AtomicU64>,
    present: Arc<std::sync::Mutex<(&'static str, Vec<u8>)>>,
}

impl Watch {
    fn start() -> Self {
        let watch = Self {
            began: Instant::now(),
            since: Arc::default(),
            present: Arc::default(),
        };
        let (began, since, present) = (watch.began, Arc::clone(&watch.since), Arc::clone(&watch.present));
        thread::spawn(move || {
            loop {
                thread::sleep(Duration::from_millis(500));
                let begun = since.load(Relaxed);
                if begun > 0 && began.elapsed() > Duration::from_millis(begun) + HANGS {
                    let present = present.lock().expect("nobody panics with it");
                    fail(present.0, &present.1, "hangs");
                }
            }
        });
        watch
    }

    fn begin(&self, target: &'static str, input: &[u8]) {
        let mut present = self.present.lock().expect("nobody panics with it");
        present.0 = target;
        present.1.clear();
        present.1.extend_from_slice(input);
        self.since.store(self.began.elapsed().as_millis() as u64 + 1, Relaxed);
    }

    fn end(&self) {
        self.since.store(0, Relaxed);
    }
}
