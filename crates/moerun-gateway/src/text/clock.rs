//! `strftime_now` of chat templates: today's date, in UTC.

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
const WEEKDAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// Now, formatted as C's `strftime` would in the C locale.
pub(super) fn strftime_now(format: &str) -> String {
    // A clock before 1970 is a machine without a clock: its date is wrong whatever is printed.
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime(format, since_epoch.as_secs())
}

/// `seconds` after 1970-01-01T00:00:00Z, formatted. Conversions that templates have no use for stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    let date = Date::from_days(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let mut text = String::with_capacity(format.len() + 16);
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let mut conversion = characters.next();
        let padded = conversion != Some('-'); // glibc's %-d: without leading zeros
        if !padded {
            conversion = characters.next();
        }
        let two = |number: u64| {
            if padded {
                format!("{number:02}")
            } else {
                number.to_string()
            }
        };
        match conversion {
            Some('Y') => text.push_str(&date.year.to_string()),
            Some('y') => text.push_str(&two(date.year % 100)),
            Some('m') => text.push_str(&two(date.month)),
            Some('d') => text.push_str(&two(date.day)),
            Some('e') => text.push_str(&if padded {
                format!("{:2}", date.day)
            } else {
                date.day.to_string()
            }),
            Some('j') => text.push_str(&if padded {
                format!("{:03}", date.day_of_year)
            } else {
                date.day_of_year.to_string()
            }),
            Some('B') => text.push_str(date.month_name()),
            Some('b' | 'h') => text.push_str(&date.month_name()[..3]),
            Some('A') => text.push_str(date.weekday),
            Some('a') => text.push_str(&date.weekday[..3]),
            Some('H') => text.push_str(&two(hour)),
            Some('I') => text.push_str(&two((hour + 11) % 12 + 1)),
            Some('M') => text.push_str(&two(minute)),
            Some('S') => text.push_str(&two(second)),
            Some('p') => text.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => text.push_str(&format!("{}-{:02}-{:02}", date.year, date.month, date.day)),
            Some('T') => text.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('Z') => text.push_str("UTC"),
            Some('z') => text.push_str("+0000"),
            Some('%') => text.push('%'),
            other => {
                text.push_str(if padded { "%" } else { "%-" });
                text.extend(other);
            }
        }
    }
    text
}

struct Date {
    year: u64,
    month: u64,
    day: u64,
    day_of_year: u64,
    weekday: &'static str,
}

impl Date {
    fn from_days(days_since_epoch: u64) -> Self {
        let weekday = WEEKDAYS[((days_since_epoch + 4) % 7) as usize]; // 1970-01-01 was a Thursday
        let (mut year, mut days) = (1970, days_since_epoch);
        // 400 Gregorian years are always 146 097 days; whole cycles are skipped so that no clock makes the loop long.
        year += 400 * (days / 146_097);
        days %= 146_097;
        while days >= days_in_year(year) {
            days -= days_in_year(year);
            year += 1;
        }
        let day_of_year = days + 1;
        let mut month = 1;
        while days >= days_in_month(year, month) {
            days -= days_in_month(year, month);
            month += 1;
        }
        Date {
            year,
            month,
            day: days + 1,
            day_of_year,
            weekday,
        }
    }

    fn month_name(&self) -> &'static str {
        MONTHS[(self.month - 1) as usize]
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_formatted_as_date_prints_them() {
        // date -u -d @SECONDS
        assert_eq!(strftime("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(
            strftime("%A, %B %-d, %Y %H:%M:%S", 951_827_696),
            "Tuesday, February 29, 2000 12:34:56"
        );
        assert_eq!(
            strftime("%Y-%m-%d %j %a %I%p", 1_767_225_599),
            "2025-12-31 365 Wed 11PM"
        );
        assert_eq!(strftime("%F %T %Z", 4_102_444_800), "2100-01-01 00:00:00 UTC");
    }

    #[test]
    fn unknown_conversions_and_a_lone_percent_stay_as_they_are() {
        assert_eq!(strftime("100% %Q %-Q %% %", 0), "100% %Q %-Q % %");
    }
}
