//! Boxes on the real kernel: what a program sees, how it ends, what is left.

mod house;

use house::{place, run, wait};

fn main() {
    run(&[("a_shell_runs", a_shell_runs)]);
}

fn a_shell_runs() {
    let mut place = place(2);
    let (out, err, exited) = place.shell("id; cat /proc/1/comm; ls /proc/self/fd; exit 7");
    println!("{out}\n{err}\n{exited:?}");
    assert_eq!(exited.status.code, Some(7));
    println!("{:?}", wait(place.spawner.pool()));
}
