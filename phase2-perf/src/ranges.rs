//! Lists of numbers as llama-bench takes them: `512,1024`, `1-4`, `8-64+8`, `1-16*2`.

/// Most numbers of one range: more is a slip of the pen.
const MOST: usize = 10_000;

/// The numbers of a list of numbers and ranges; a range without a step counts by one.
///
/// # Errors
/// Says which part is no number or range.
pub fn numbers(list: &str) -> Result<Vec<usize>, String> {
    let mut all = Vec::new();
    for part in list.split(',') {
        range(part.trim(), &mut all)
            .ok_or_else(|| format!("`{part}` is no number or range (512, 1-4, 8-64+8, 1-16*2)"))?;
    }
    Ok(all)
}

fn range(part: &str, all: &mut Vec<usize>) -> Option<()> {
    let Some((first, rest)) = part.split_once('-') else {
        all.push(part.parse().ok()?);
        return Some(());
    };
    let (last, step, times) = if let Some((last, step)) = rest.split_once('+') {
        (last, step.parse().ok()?, 1)
    } else if let Some((last, times)) = rest.split_once('*') {
        (last, 0, times.parse().ok()?)
    } else {
        (rest, 1, 1)
    };
    let (mut at, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
    let before = all.len();
    while at <= last {
        if all.len() - before == MOST {
            return None;
        }
        all.push(at);
        let next = at.checked_mul(times)?.checked_add(step)?;
        if next <= at {
            return None;
        }
        at = next;
    }
    (all.len() > before).then_some(())
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn lists_and_ranges() {
        for (list, want) in [
            ("512", &[512][..]),
            ("0", &[0]),
            ("512, 128", &[512, 128]),
            ("1-4", &[1, 2, 3, 4]),
            ("8-32+8", &[8, 16, 24, 32]),
            ("8-30+8", &[8, 16, 24]),
            ("1-16*2", &[1, 2, 4, 8, 16]),
            ("3-3", &[3]),
            ("7,1-5+2", &[7, 1, 3, 5]),
        ] {
            assert_eq!(numbers(list).as_deref(), Ok(want), "{list}");
        }
    }

    #[test]
    fn what_is_none_is_named() {
        for list in [
            "",
            "x",
            "1-",
            "-1",
            "4-1",
            "1-8*1",
            "1-8+0",
            "0-8*2",
            "1-99999999",
            "1-3/2",
        ] {
            let error = numbers(&format!("5,{list}")).unwrap_err();
            assert!(error.contains(&format!("`{list}`")), "{error}");
        }
    }
}
