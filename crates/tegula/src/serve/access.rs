//! Who may use the server.
//!
//! Without keys, loopback alone doesn't keep strangers out: a page in the user's browser can
//! send requests there, and by a name that resolves to 127.0.0.1 even read the answers. So
//! pages of other origins are refused unless they are allowed, and so are foreign names.

use axum::http::{HeaderMap, HeaderValue, Method, header};
use subtle::ConstantTimeEq as _;
use tegula_server::ApiError;

/// The longest key, in bytes.
pub const MAX_KEY: usize = 256;

/// Who is let in.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// None: no key is asked for.
    pub keys: Vec<String>,
    /// Origins whose pages may use the server; `*`: all.
    pub origins: Vec<String>,
    /// Names besides loopback's own, where that is all the protection there is.
    pub hosts: Vec<String>,
    /// Whether the server listens on loopback only.
    pub loopback: bool,
}

/// What the response to an allowed origin must say.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// The request doesn't come from a page, or from one of ours.
    Own,
    /// A page of this origin, which is allowed.
    Allowed(HeaderValue),
}

impl Access {
    /// Whether a request with these headers may come from where it comes from.
    pub fn origin(&self, headers: &HeaderMap) -> Result<Origin, ApiError> {
        let host = text(headers, header::HOST);
        if self.loopback && self.keys.is_empty() && host.is_some_and(|host| !self.knows(host)) {
            return Err(ApiError::new(
                403,
                "forbidden_host",
                "the server is not known by this name; allow it with --allowed-host",
            ));
        }
        let Some(value) = headers.get(header::ORIGIN) else {
            return Ok(Origin::Own);
        };
        let origin = value.to_str().unwrap_or("null");
        let own = origin.split_once("://").map(|(_, host)| host);
        if own.is_some() && own == host {
            return Ok(Origin::Own);
        }
        match self.origins.iter().any(|o| o == "*" || o == origin) {
            true => Ok(Origin::Allowed(value.clone())),
            false => Err(ApiError::new(
                403,
                "forbidden_origin",
                "pages of this origin may not use the server; allow them with --cors-origin",
            )),
        }
    }

    fn knows(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => host.rsplit_once(':').map_or(host, |(name, _)| name),
        };
        let loopback = match name.parse::<std::net::IpAddr>() {
            Ok(ip) => ip.is_loopback(),
            Err(_) => name.eq_ignore_ascii_case("localhost"),
        };
        loopback || self.hosts.iter().any(|h| h.eq_ignore_ascii_case(name))
    }

    /// The number of the key that a request bears, counted from 1; 0 where none is asked for.
    /// How long it takes tells nothing about the keys.
    pub fn key(&self, headers: &HeaderMap) -> Result<u32, ApiError> {
        if self.keys.is_empty() {
            return Ok(0);
        }
        let bearer = text(headers, header::AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        });
        let given = bearer.or_else(|| headers.get("x-api-key")?.to_str().ok());
        let Some(given) = given else {
            return Err(ApiError::new(
                401,
                "missing_api_key",
                "this server asks for a key: send it as `Authorization: Bearer KEY`",
            ));
        };
        let given = padded(given);
        let mut found = 0;
        for (key, number) in self.keys.iter().zip(1u32..) {
            let equal = u32::from(padded(key).ct_eq(&given).unwrap_u8());
            found |= equal * number;
        }
        match found {
            0 => Err(ApiError::new(
                401,
                "invalid_api_key",
                "the key is not valid",
            )),
            number => Ok(number),
        }
    }
}

/// A key behind its length, filled up, so that all take the same time to compare.
fn padded(key: &str) -> [u8; MAX_KEY + 8] {
    let mut bytes = [0; MAX_KEY + 8];
    let n = key.len().min(MAX_KEY);
    bytes[..n].copy_from_slice(&key.as_bytes()[..n]);
    bytes[MAX_KEY..].copy_from_slice(&(key.len() as u64).to_le_bytes());
    bytes
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// Whether a browser asks beforehand what it may do.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            let name = header::HeaderName::from_static(name);
            (name, HeaderValue::from_str(value).unwrap())
        };
        list.iter().map(pair).collect()
    }

    fn code<T: std::fmt::Debug>(result: Result<T, ApiError>) -> (u16, &'static str) {
        let error = result.unwrap_err();
        (error.status, error.code)
    }

    #[test]
    fn keys_are_asked_for_in_either_header() {
        let access = Access {
            keys: vec!["alpha".into(), "beta".into()],
            ..Access::default()
        };
        assert_eq!(
            access.key(&headers(&[("authorization", "Bearer beta")])),
            Ok(2)
        );
        assert_eq!(
            access.key(&headers(&[("authorization", "bearer alpha")])),
            Ok(1)
        );
        assert_eq!(access.key(&headers(&[("x-api-key", "alpha")])), Ok(1));
        assert_eq!(code(access.key(&headers(&[]))), (401, "missing_api_key"));
        for wrong in [
            "Bearer alph",
            "Bearer alphaa",
            "Bearer alpha\u{0}",
            "Basic alpha",
            "Bearer ",
        ] {
            let Ok(value) = HeaderValue::from_str(wrong) else {
                continue;
            };
            let mut map = HeaderMap::new();
            map.insert(header::AUTHORIZATION, value);
            assert_eq!(code(access.key(&map)).0, 401, "{wrong}");
        }
        let long = format!("Bearer {}", "a".repeat(10_000));
        assert_eq!(
            code(access.key(&headers(&[("authorization", &long)]))).0,
            401
        );
        assert_eq!(Access::default().key(&headers(&[])), Ok(0));
    }

    #[test]
    fn pages_of_strangers_are_refused() {
        let access = Access {
            loopback: true,
            origins: vec!["https://friend.example".into()],
            ..Access::default()
        };
        let host = ("host", "127.0.0.1:8080");
        assert_eq!(access.origin(&headers(&[host])), Ok(Origin::Own));
        let own = headers(&[host, ("origin", "http://127.0.0.1:8080")]);
        assert_eq!(access.origin(&own), Ok(Origin::Own));
        let friend = headers(&[host, ("origin", "https://friend.example")]);
        assert!(matches!(access.origin(&friend), Ok(Origin::Allowed(_))));
        for origin in ["https://evil.example", "null", "http://127.0.0.1:1"] {
            let headers = headers(&[host, ("origin", origin)]);
            assert_eq!(code(access.origin(&headers)), (403, "forbidden_origin"));
        }
    }

    #[test]
    fn names_that_only_resolve_to_loopback_are_refused() {
        let mut access = Access {
            loopback: true,
            hosts: vec!["box.local".into()],
            ..Access::default()
        };
        for host in [
            "localhost",
            "localhost:80",
            "127.0.0.2:8080",
            "[::1]:8080",
            "BOX.local:1",
        ] {
            assert!(access.origin(&headers(&[("host", host)])).is_ok(), "{host}");
        }
        let rebound = headers(&[
            ("host", "evil.example:8080"),
            ("origin", "http://evil.example:8080"),
        ]);
        assert_eq!(code(access.origin(&rebound)), (403, "forbidden_host"));
        access.keys = vec!["k".into()];
        assert!(access.origin(&rebound).is_ok(), "the key protects");
    }
}
