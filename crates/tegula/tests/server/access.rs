//! Who is let in, and what the server shows of itself.

use crate::support::Server;
use serde_json::json;
use tegula_gguf::{GgmlType, Metadata, writer::GgufWriter};

const ROUTES: [(&str, &str); 14] = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/ferrous-moe-21m"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/props"),
    ("GET", "/slots"),
    ("GET", "/metrics"),
    ("GET", "/explain"),
    ("GET", "/lora-adapters"),
    ("GET", "/nowhere"),
    ("DELETE", "/v1/models"),
];

#[test]
fn a_key_may_come_from_the_environment() {
    let server = Server::start_with(&[("TEGULA_API_KEY", "hidden")], &[]);
    assert_eq!(server.get("/v1/models").status, 401);
    let header = ["Authorization: Bearer hidden"];
    let with = server.request("GET", "/v1/models", &header, b"");
    assert_eq!(with.status, 200);
}

#[test]
fn a_key_opens_every_route_and_nothing_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "# two of them\nsecond\n\n third \n").unwrap();
    let server = Server::start(&[
        "--api-key",
        "first",
        "--api-key-file",
        file.to_str().unwrap(),
    ]);
    for (method, path) in ROUTES {
        let none = server.request(method, path, &[], b"{}");
        assert_eq!(
            (none.status, none.error().as_str()),
            (401, "missing_api_key"),
            "{path}"
        );
        assert_eq!(none.header("WWW-Authenticate"), Some("Bearer"));
        let wrong = server.request(method, path, &["Authorization: Bearer firs"], b"{}");
        assert_eq!(
            (wrong.status, wrong.error().as_str()),
            (401, "invalid_api_key"),
            "{path}"
        );
    }
    for key in ["first", "second", "third"] {
        let header = format!("Authorization: Bearer {key}");
        assert_eq!(
            server.request("GET", "/v1/models", &[&header], b"").status,
            200
        );
        let header = format!("X-Api-Key: {key}");
        assert_eq!(server.request("GET", "/props", &[&header], b"").status, 200);
    }
    for public in ["/", "/page.js", "/page.css", "/health"] {
        assert_eq!(server.get(public).status, 200, "{public}");
    }
}

#[test]
fn other_origins_and_names_are_refused_unless_allowed() {
    let server = Server::start(&[
        "--cors-origin",
        "https://friend.example",
        "--allowed-host",
        "box.local",
    ]);
    let ask = |headers: &[&str]| server.request("GET", "/v1/models", headers, b"");
    let evil = ask(&["Origin: https://evil.example"]);
    assert_eq!(
        (evil.status, evil.error().as_str()),
        (403, "forbidden_origin")
    );
    assert_eq!(evil.header("Access-Control-Allow-Origin"), None);
    let own = ask(&[&format!("Origin: http://{}", server.address)]);
    assert_eq!(
        (own.status, own.header("Access-Control-Allow-Origin")),
        (200, None)
    );
    let friend = ask(&["Origin: https://friend.example"]);
    assert_eq!(friend.status, 200);
    assert_eq!(
        friend.header("Access-Control-Allow-Origin"),
        Some("https://friend.example")
    );
    let preflight = [
        "Origin: https://friend.example",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization",
    ];
    let preflight = server.request("OPTIONS", "/v1/chat/completions", &preflight, b"");
    assert_eq!(preflight.status, 204);
    assert!(
        preflight
            .header("Access-Control-Allow-Headers")
            .unwrap()
            .contains("authorization")
    );
    // A name that merely resolves here.
    for (host, status) in [
        ("evil.example", 403),
        ("box.local:1", 200),
        ("localhost", 200),
    ] {
        let mut stream = server.connect();
        let head = format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        std::io::Write::write_all(&mut stream, head.as_bytes()).unwrap();
        let response = crate::support::Response::read(stream);
        assert_eq!(response.status, status, "{host}");
        if status == 403 {
            assert_eq!(response.error(), "forbidden_host");
        }
    }
}

#[test]
fn what_it_shows_is_the_same_as_ever() {
    let server = Server::start(&["--alias", "tile", "-c", "1024", "-np", "2", "--temp", "0.5"]);
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tile");
    assert_eq!(server.get("/v1/models/tile").json()["object"], "model");
    let none = server.get("/v1/models/none");
    assert_eq!(
        (none.status, none.error().as_str()),
        (404, "model_not_found")
    );
    let props = server.get("/props").json();
    assert_eq!(props["total_slots"], 2);
    assert_eq!(props["default_generation_settings"]["n_ctx"], 512);
    assert_eq!(
        props["default_generation_settings"]["params"]["temperature"],
        0.5
    );
    let slots = server.get("/slots").json();
    assert_eq!(slots.as_array().unwrap().len(), 2);
    assert_eq!(slots[1]["is_processing"], false);
    let explain = server.get("/explain").json();
    assert_eq!(explain["threads"], 2);
    assert!(explain["tensors"].as_array().unwrap().len() > 60);
    assert_eq!(server.get("/lora-adapters").json(), json!([]));

    let tokens = server.post(
        "/tokenize",
        &json!({"content": "Grüße, <|im_end|>", "with_pieces": true}),
    );
    let tokens = tokens.json()["tokens"].clone();
    let ids: Vec<_> = tokens
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["id"].clone())
        .collect();
    assert!(
        ids.contains(&json!(2)),
        "special tokens are parsed: {tokens}"
    );
    let back = server.post("/detokenize", &json!({"tokens": ids})).json();
    assert_eq!(back["content"], "Grüße, <|im_end|>");
    let plain = json!({"content": "<|im_end|>", "parse_special": false});
    let plain = server.post("/tokenize", &plain).json();
    assert!(plain["tokens"].as_array().unwrap().len() > 1);

    server.assert_well();
    let metrics = server.get("/metrics");
    assert!(
        metrics
            .header("Content-Type")
            .unwrap()
            .starts_with("text/plain; version=0.0.4")
    );
    let text = metrics.text();
    assert!(
        text.contains("\ntegula_generated_tokens_total 3\n"),
        "{text}"
    );
    assert!(
        text.contains("tegula_first_token_seconds_bucket{le=\"+Inf\"} 1\n"),
        "{text}"
    );
    // Every sample has its help and type.
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(name);
        assert!(text.contains(&format!("# TYPE {family} ")), "{line}");
        assert!(text.contains(&format!("# HELP {family} ")), "{line}");
        let value: f64 = line.rsplit(' ').next().unwrap().parse().unwrap();
        assert!(value >= 0.0);
    }
}

#[test]
fn no_path_leads_to_the_file_system() {
    let server = Server::start(&[]);
    for path in [
        "/../../../../etc/passwd",
        "//etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/../../Cargo.toml",
        "/v1/models//etc/passwd",
        "/page.js/../../Cargo.toml",
        "/assets/ferrous-moe-21m-Q4_0.gguf",
        "/.git/config",
    ] {
        let response = server.get(path);
        let error = (response.status, response.error());
        let expected = match path.starts_with("/v1/models/") {
            true => "model_not_found",
            false => "unknown_route",
        };
        assert_eq!(error, (404, expected.to_owned()), "{path}");
    }
    for (method, path) in [
        ("POST", "/"),
        ("PUT", "/v1/models"),
        ("GET", "/v1/completions"),
    ] {
        let response = server.request(method, path, &[], b"");
        assert_eq!(
            (response.status, response.error().as_str()),
            (405, "method_not_allowed")
        );
    }
}

#[test]
fn adapters_are_listed_with_their_scales() {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "qwen3moe");
    metadata.set("general.type", "adapter");
    metadata.set("adapter.type", "lora");
    let mut writer = GgufWriter::new(metadata);
    for (which, shape) in [("a", [256, 2]), ("b", [2, 256])] {
        let name = format!("blk.0.attn_q.weight.lora_{which}");
        writer.add_tensor(&name, GgmlType::F32, &shape).unwrap();
    }
    let factor = [0; 4 * 2 * 256];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lora.gguf");
    std::fs::write(&file, writer.to_bytes(&[&factor, &factor]).unwrap()).unwrap();
    let path = file.to_str().unwrap();
    let server = Server::start(&["--lora-scaled", &format!("{path}:0.5"), "--lora", path]);
    let listed = server.get("/lora-adapters").json();
    let one = |id, scale| json!({"id": id, "path": path, "scale": scale});
    assert_eq!(listed, json!([one(0, 1.0), one(1, 0.5)]));
    let explain = server.get("/explain").json();
    assert_eq!(explain["adapters"][1]["scale"], 0.5);
    // They are fixed while the server runs.
    let set = server.post("/lora-adapters", &json!([{"id": 0, "scale": 0.0}]));
    assert_eq!(set.status, 405);
}
