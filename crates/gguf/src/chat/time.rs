//! `strftime_now`: the present time in the forms that Python's `strftime` knows.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// Seconds since 1970, UTC.
pub(super) fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

/// Year, month (1–12) and day (1–31) of the day `days` after 1970-01-01 in the proleptic
/// Gregorian calendar.
fn civil(days: i64) -> (i64, usize, i64) {
    // Years begin in March here, so that the leap day is the last of its year.
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day = days.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + next, month as usize, day)
}

/// `time`, in seconds since 1970, as `format` says.
///
/// Knows the directives that Python has in the C locale except week numbers and zones, and
/// `-` for no padding.
pub(super) fn strftime(format: &str, time: i64) -> Result<String, String> {
    let days = time.div_euclid(86_400);
    let second = time.rem_euclid(86_400);
    let (year, month, day) = civil(days);
    let weekday = (days + 4).rem_euclid(7) as usize;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month - 1];
    let year_day = before + day + i64::from(leap && month > 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let bare = directive == Some('-');
        if bare {
            directive = chars.next();
        }
        let (number, width) = match directive {
            Some('Y') => (year, 4),
            Some('y') => (year.rem_euclid(100), 2),
            Some('m') => (month as i64, 2),
            Some('d') => (day, 2),
            Some('H') => (hour, 2),
            Some('I') => ((hour + 11) % 12 + 1, 2),
            Some('M') => (minute, 2),
            Some('S') => (second, 2),
            Some('j') => (year_day, 3),
            Some('w') => (weekday as i64, 1),
            Some(other) => {
                let expanded;
                out.push_str(match other {
                    'B' => MONTHS[month - 1],
                    'b' | 'h' => &MONTHS[month - 1][..3],
                    'A' => DAYS[weekday],
                    'a' => &DAYS[weekday][..3],
                    'p' if hour < 12 => "AM",
                    'p' => "PM",
                    '%' => "%",
                    'n' => "\n",
                    't' => "\t",
                    'F' | 'T' | 'R' | 'D' | 'x' | 'X' | 'c' => {
                        expanded = strftime(
                            match other {
                                'F' => "%Y-%m-%d",
                                'T' | 'X' => "%H:%M:%S",
                                'R' => "%H:%M",
                                'c' => "%a %b %d %H:%M:%S %Y",
                                _ => "%m/%d/%y",
                            },
                            time,
                        )?;
                        &expanded
                    }
                    'e' => {
                        expanded = format!("{day:>2}");
                        &expanded
                    }
                    _ => return Err(format!("strftime_now does not know %{other}")),
                });
                continue;
            }
            None => return Err("strftime_now: the format ends in %".to_owned()),
        };
        let width = if bare { 0 } else { width };
        let _ = write!(out, "{number:0width$}");
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn dates_equal_those_of_python() {
        // datetime.datetime.fromtimestamp(t, datetime.UTC).strftime(...)
        for (time, expected) in [
            (0, "Thu 01 January 1970 00:00:00 001 AM 12 4"),
            (951_782_399, "Mon 28 February 2000 23:59:59 059 PM 11 1"),
            (951_868_800, "Wed 01 March 2000 00:00:00 061 AM 12 3"),
            (1_721_995_200, "Fri 26 July 2024 12:00:00 208 PM 12 5"),
            (4_107_542_399, "Sun 28 February 2100 23:59:59 059 PM 11 0"),
            (-1, "Wed 31 December 1969 23:59:59 365 PM 11 3"),
        ] {
            assert_eq!(
                strftime("%a %d %B %Y %H:%M:%S %j %p %I %w", time).expect("date"),
                expected
            );
        }
        assert_eq!(
            strftime("%F %T %-d/%-m %e %b %y 100%%", 1_720_000_000).expect("date"),
            "2024-07-03 09:46:40 3/7  3 Jul 24 100%"
        );
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err());
    }
}
