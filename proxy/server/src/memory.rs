//! Memory given back to the kernel.

/// Returns freed memory. Compiling a large configuration and rendering it for the admin interface free many times what
/// they keep, and the allocator holds on to that. It looks at the memory of the calling thread, which costs a millisecond: the
/// main thread calls it after start-up and, at most once per flush interval, after changes; a rendering thread at its end.
#[expect(unsafe_code, reason = "the allocator's collection has no safe wrapper")]
pub fn give_back() {
    // SAFETY: mi_collect takes no pointer, and is safe to call from any thread at any time.
    unsafe { libmimalloc_sys::mi_collect(true) };
}

/// Lets go of the program's code. Start-up runs through seven megabytes of it once, and an idle proxy through a hundred
/// kilobytes; what is run again comes back from the page cache by one short fault for each 64 KiB.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "madvise has no safe wrapper")]
pub fn let_go_of_code() {
    let here = let_go_of_code as fn() as usize;
    let Some(code) = std::fs::read_to_string("/proc/self/maps").ok().and_then(|maps| code(&maps, here))
    else {
        return;
    };
    // SAFETY: the range is one mapping of the kernel's list, private, of a file, and not writable. The program is position
    // independent without text relocations, so its pages hold what the file holds: dropping them changes nothing that a read
    // or a jump could see. (A breakpoint that a debugger has set before start-up ended is lost.)
    unsafe { libc::madvise(code.start as *mut _, code.len(), libc::MADV_DONTNEED) };
}

/// Elsewhere the kernel decides.
#[cfg(not(target_os = "linux"))]
pub fn let_go_of_code() {}

/// The mapping that `address` lies in, if it is a file's code that nobody writes to.
#[cfg(target_os = "linux")]
fn code(maps: &str, address: usize) -> Option<std::ops::Range<usize>> {
    maps.lines().find_map(|line| {
        // 55d0-55f0 r-xp 00002000 fe:01 1234    /usr/bin/waystation
        let mut columns = line.split_ascii_whitespace();
        let (start, end) = columns.next()?.split_once('-')?;
        let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
        let is_code =
            columns.next() == Some("r-xp") && columns.nth(3).is_some_and(|file| file.starts_with('/'));
        (is_code && range.contains(&address)).then_some(range)
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const MAPS: &str = "\
1000-2000 r--p 00000000 fe:01 12 /bin/waystation
2000-5000 r-xp 00001000 fe:01 12 /bin/waystation
5000-6000 rwxp 00004000 fe:01 12 /bin/waystation
6000-7000 r-xp 00000000 00:00 0 [vdso]
7000-8000 r-xp 00000000 00:00 0
";

    #[test]
    fn only_a_files_code_that_nobody_writes_to() {
        assert_eq!(code(MAPS, 0x2000), Some(0x2000..0x5000));
        assert_eq!(code(MAPS, 0x4fff), Some(0x2000..0x5000));
        for other in [0x1000, 0x5000, 0x6000, 0x7000, 0x8000] {
            assert_eq!(code(MAPS, other), None, "{other:x}");
        }
    }

    #[test]
    fn code_runs_on_after_it_was_let_go() {
        let_go_of_code();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(code(&maps, let_go_of_code as fn() as usize).is_some());
    }
}
