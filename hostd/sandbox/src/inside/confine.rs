//! Giving up: the two seccomp filters, landlock, capabilities.
//!
//! The first filter is an allow-list and is installed while parking, because installing it costs half a
//! millisecond. It still lets through the few mount calls that a claim needs; the second, tiny one
//! takes those away. What is not allowed answers `ENOSYS`, so that a C library falls back as it would
//! on an older kernel. Left out: 32-bit and x32 programs (killed, or every call refused).

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope,
};
use seccompiler::BpfProgram;

use crate::error::Fault;
use crate::filter::{Check, Test, Verdict, compile};
use crate::sys;
use crate::syscalls::{ALLOWED, FOR_THE_CLAIM};

/// Both filters, compiled once by the spawner.
pub(crate) struct Filters {
    first: BpfProgram,
    second: BpfProgram,
}

/// What landlock is asked for; older kernels give what they have.
const FENCE: ABI = ABI::V6;
/// Clone flags that make a namespace, `CLONE_NEWTIME` aside (which is no clone flag but a signal bit).
const NAMESPACES: u32 = 0x7e02_0000;
const ENOSYS: u16 = 38;
const EPERM: u16 = 1;

fn check(argument: u8, test: Test, then: Verdict, otherwise: Verdict) -> Verdict {
    Verdict::Check(Check { argument, test, then: Box::new(then), otherwise: Box::new(otherwise) })
}

/// Calls that are allowed by their arguments.
fn special_rules() -> [(i64, Verdict); 4] {
    use Verdict::{Allow, Refuse};
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(i32::unsigned_abs);
    let netlink = libc::AF_NETLINK.unsigned_abs();
    // No vsock (it is in no namespace and ends at the hypervisor), no packet, no AF_ALG; of netlink
    // only routes, which C libraries ask for addresses.
    let routes = check(2, Test::OneOf(vec![0]), Allow, Refuse(ENOSYS));
    let or_netlink = check(0, Test::OneOf(vec![netlink]), routes, Refuse(ENOSYS));
    // Neither typing into a terminal for its reader (TIOCSTI) nor pasting on a console (TIOCLINUX).
    let terminal = Test::OneOf(vec![0x5412, 0x541c]);
    let personalities = vec![0, 0x0008, 0x0002_0000, 0x0002_0008, 0x0004_0000, 0xffff_ffff];
    [
        (libc::SYS_clone, check(0, Test::AnyBit(NAMESPACES), Refuse(EPERM), Allow)),
        (libc::SYS_ioctl, check(1, terminal, Refuse(EPERM), Allow)),
        (libc::SYS_personality, check(0, Test::OneOf(personalities), Allow, Refuse(EPERM))),
        (libc::SYS_socket, check(0, Test::OneOf(families.to_vec()), Allow, or_netlink)),
    ]
}

fn numbered(
    rules: impl IntoIterator<Item = (i64, Verdict)>,
) -> Result<BTreeMap<u32, Verdict>, String> {
    let narrow = |(n, v)| u32::try_from(n).map(|n| (n, v)).map_err(|e| format!("seccomp: {e}"));
    rules.into_iter().map(narrow).collect()
}

impl Filters {
    /// Compiles both.
    pub(crate) fn compile() -> Result<Self, String> {
        let allowed = ALLOWED.iter().chain(FOR_THE_CLAIM).map(|n| (*n, Verdict::Allow));
        let first = compile(&numbered(allowed.chain(special_rules()))?, &Verdict::Refuse(ENOSYS))?;
        let taken = FOR_THE_CLAIM.iter().map(|n| (*n, Verdict::Refuse(EPERM)));
        let second = compile(&numbered(taken)?, &Verdict::Allow)?;
        Ok(Self { first, second })
    }

    /// Installs the allow-list (and `no_new_privs`) on this process.
    pub(super) fn install_first(&self) -> Result<(), Fault> {
        apply(&self.first)
    }
}

fn apply(filter: &BpfProgram) -> Result<(), Fault> {
    seccompiler::apply_filter(filter)
        .map_err(|_| Fault::os("seccomp", &std::io::Error::last_os_error()))
}

/// Everything that is left to give up once the root stands.
pub(super) fn confine(
    filters: &Filters,
    fence: RulesetCreated,
    root: BorrowedFd<'_>,
) -> Result<(), Fault> {
    close(fence, root).map_err(no_fence)?;
    sys::drop_capabilities().map_err(|e| Fault::os("capabilities", &e))?;
    apply(&filters.second)
}

fn no_fence(why: landlock::RulesetError) -> Fault {
    Fault::BoxDied { what: format!("landlock: {why}") }
}

/// Landlock: only what lies beneath this root; so a descriptor or magic link to anything else (the
/// runner's binary, a host directory) opens nothing. Signals and abstract sockets stay inside too.
/// Made while parking, without the root, and not yet in force.
pub(super) fn fence() -> Result<RulesetCreated, Fault> {
    let make = || {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(FENCE))?
            .scope(Scope::from_all(FENCE))?
            .create()
    };
    make().map_err(no_fence)
}

fn close(fence: RulesetCreated, root: BorrowedFd<'_>) -> Result<(), landlock::RulesetError> {
    let devices: BitFlags<AccessFs> = AccessFs::MakeBlock | AccessFs::MakeChar;
    let beneath = AccessFs::from_all(FENCE) & !devices;
    fence.add_rule(PathBeneath::new(root, beneath))?.restrict_self().map(drop)
}
