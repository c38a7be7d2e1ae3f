//! The arrows of ARCHITECTURE.md, checked: a module names only the modules listed for it.

use std::fs;
use std::path::Path;

/// Module -> modules it may use besides `error`: the table there, `| module | uses | never |`.
fn may_use() -> Vec<(String, Vec<String>)> {
    let page = include_str!("../ARCHITECTURE.md");
    let table = page.split("| module | uses | never |\n|---|---|---|\n").nth(1).unwrap();
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    let rows = rows.map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    let rows: Vec<_> = rows.map(|cells| (names(cells[1]), names(cells[2]))).collect();
    let every: Vec<String> = rows.iter().flat_map(|(modules, _)| modules.clone()).collect();
    let mut all = vec![("error".to_owned(), Vec::new())];
    for (modules, uses) in rows {
        let uses = if uses == ["all"] { every.clone() } else { uses };
        all.extend(modules.into_iter().map(|module| (module, uses.clone())));
    }
    all
}

/// The first word of each item of a list.
fn names(list: &str) -> Vec<String> {
    list.split(", ").filter_map(|item| Some(item.split_whitespace().next()?.to_owned())).collect()
}

fn sources(path: &Path, out: &mut Vec<(String, String)>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            sources(&entry.unwrap().path(), out);
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        out.push((path.display().to_string(), fs::read_to_string(path).unwrap()));
    }
}

/// Code without comments, which may name anything.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// Names that follow `crate::`, those in braces included.
fn used(text: &str) -> Vec<String> {
    let name = |s: &str| -> String {
        s.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut all = Vec::new();
    for rest in text.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => all.push(name(rest)),
            Some(list) => {
                // Only the first names of a list: what follows `::` or stands in inner braces is inside them.
                let (mut depth, mut start) = (0, true);
                for (i, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => start = true,
                        c if start && (c.is_alphabetic() || c == '_') => {
                            all.push(name(&list[i..]));
                            start = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    all
}

#[test]
fn modules_use_only_what_is_below_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("rust/src");
    let may_use = may_use();
    for entry in fs::read_dir(&root).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let module = name.trim_end_matches(".rs");
        let listed = may_use.iter().any(|(listed, _)| listed == module);
        assert!(module == "lib" || listed, "{module} is not in the table of ARCHITECTURE.md");
    }
    for (module, allowed) in &may_use {
        let mut files = Vec::new();
        for path in [root.join(module), root.join(format!("{module}.rs"))] {
            if path.exists() {
                sources(&path, &mut files);
            }
        }
        assert!(!files.is_empty(), "{module}: no such module");
        for (path, text) in files {
            for used in used(&code(&text)) {
                // Types of the crate's root: `Error`, `Result`.
                let is_module = used.chars().next().is_some_and(char::is_lowercase);
                let fine =
                    !is_module || used == "error" || used == *module || allowed.contains(&used);
                assert!(fine, "{path}: {module} must not use {used}");
            }
        }
    }
}

#[test]
fn unsafe_stays_where_it_is_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("rust/src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    for (path, text) in files {
        let allowed = ["kernels", "backend/cpu", "backend/cuda", "file"]
            .iter()
            .any(|m| path.contains(&format!("rust/src/{m}")));
        let uses = code(&text).contains("unsafe {") || code(&text).contains("unsafe impl");
        assert!(allowed || !uses, "{path}: unsafe code");
    }
}
