//! Memory given back to the kernel.

/// Returns freed memory. Compiling a large configuration and rendering it for the admin interface free many times what
/// they keep, and the allocator holds on to that. It looks at the memory of the calling thread, which costs a millisecond: the
/// main thread calls it after start-up and, at most once per flush interval, after changes; a rendering thread at its end.
#[expect(unsafe_code, reason = "the allocator's collection has no safe wrapper")]
pub fn give_back() {
    // SAFETY: mi_collect takes no pointer, and is safe to call from any thread at any time.
    unsafe { libmimalloc_sys::mi_collect(true) };
}

/// What `server.memory_allocated` and the `fixed_heap` monitor call the heap, in bytes: resident memory that is no file's. The
/// allocator does not tell what of its pages is in use; but a page that it has given back is not resident, and what counts
/// against a limit of the process is what is.
pub fn heap() -> u64 {
    let Resident { all, files } = resident();
    all.saturating_sub(files)
}

/// Resident memory of the process, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resident {
    /// All of it.
    pub all: u64,
    /// What of it are pages of files.
    pub files: u64,
}

/// What the kernel says of this process; nothing where there is no `/proc`.
pub fn resident() -> Resident {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut pages =
        statm.split(' ').skip(1).map_while(|field| field.parse::<u64>().ok()).map(|pages| pages * 4096);
    let mut next = || pages.next().unwrap_or_default();
    Resident { all: next(), files: next() }
}

/// Lets go of the program's code and constants. Start-up runs through nine megabytes of them once, and an idle proxy through
/// a fraction; what is used again comes back from the page cache by one short fault for each 64 KiB.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "madvise has no safe wrapper")]
pub fn let_go_of_program() {
    let here = let_go_of_program as fn() as usize;
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return };
    for range in unchanged(&maps, here) {
        // SAFETY: the range is one mapping of the kernel's list, private, of the program's file, not writable, and none of its
        // pages differs from the file (`Anonymous`): dropping them changes nothing that a read or a jump could see. (A
        // breakpoint that a debugger sets in between is lost.)
        unsafe { libc::madvise(range.start as *mut _, range.len(), libc::MADV_DONTNEED) };
    }
}

/// Elsewhere the kernel decides.
#[cfg(not(target_os = "linux"))]
pub fn let_go_of_program() {}

/// The mappings of the file that `address` lies in which nobody writes to and nobody has written to: relocated constants have
/// been.
#[cfg(target_os = "linux")]
fn unchanged(smaps: &str, address: usize) -> Vec<std::ops::Range<usize>> {
    let mut found: Vec<(std::ops::Range<usize>, &str)> = Vec::new();
    let mut mapping = None;
    for line in smaps.lines() {
        // 55d0-55f0 r-xp 00002000 fe:01 1234    /usr/bin/waystation
        // Anonymous:             0 kB
        let mut columns = line.split_ascii_whitespace();
        let first = columns.next().unwrap_or_default();
        if first == "Anonymous:" {
            let is_clean = columns.next() == Some("0");
            found.extend(mapping.take().filter(|_| is_clean));
        } else if let Some((start, end)) = first.split_once('-') {
            let parse = |text| usize::from_str_radix(text, 16).ok();
            let range = parse(start).zip(parse(end)).map(|(start, end)| start..end);
            let is_read_only = matches!(columns.next(), Some("r-xp" | "r--p"));
            let file = columns.nth(3).filter(|file| file.starts_with('/') && is_read_only);
            mapping = range.zip(file);
        }
    }
    let own = found.iter().find(|(range, _)| range.contains(&address)).map(|(_, file)| *file);
    found.into_iter().filter(|(_, file)| Some(*file) == own).map(|(range, _)| range).collect()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const MAPS: &str = "\
1000-2000 r--p 00000000 fe:01 12 /bin/waystation
Size:                  4 kB
Anonymous:             0 kB
2000-5000 r-xp 00001000 fe:01 12 /bin/waystation
Anonymous:             0 kB
5000-6000 r--p 00004000 fe:01 12 /bin/waystation
Anonymous:             4 kB
6000-7000 rw-p 00005000 fe:01 12 /bin/waystation
Anonymous:             0 kB
7000-8000 r--p 00000000 fe:01 13 /lib/libc.so.6
Anonymous:             0 kB
8000-9000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
9000-a000 r-xp 00000000 00:00 0
Anonymous:             0 kB
";

    #[test]
    fn only_what_is_the_programs_file_still() {
        assert_eq!(unchanged(MAPS, 0x2000), [0x1000..0x2000, 0x2000..0x5000]);
        assert_eq!(unchanged(MAPS, 0x4fff), [0x1000..0x2000, 0x2000..0x5000]);
        for other in [0x5000, 0x6000, 0x8000, 0x9000, 0xa000] {
            assert!(unchanged(MAPS, other).is_empty(), "{other:x}");
        }
    }

    #[test]
    fn the_program_runs_on_after_it_was_let_go() {
        let_go_of_program();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        assert!(!unchanged(&maps, let_go_of_program as fn() as usize).is_empty());
    }
}
