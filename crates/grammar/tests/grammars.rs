//! Grammars over a real vocabulary: what they let through, what they don't, and that hostile
//! ones are refused in bounded time and memory.

use std::path::Path;

use serde_json::{Value, json};
use tegula_engine::Constraint as _;
use tegula_gguf::{Gguf, Tokenizer, tokenizer::EncodeOptions};
use tegula_grammar::{Compiler, Grammar, json_rule, literal_rule, regex_rule};

fn tokenizer() -> Tokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gguf/tests/data/ferrous-vocab.gguf");
    Tokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap()
}

/// How far a text gets.
#[derive(Debug, PartialEq)]
enum Fate {
    /// It may end here.
    Accepted,
    /// It is a beginning.
    Incomplete,
    /// It can't go on in front of this token.
    StoppedAt(String),
}

struct Tester {
    tokenizer: Tokenizer,
    compiler: Compiler,
}

impl Tester {
    fn new() -> Tester {
        let tokenizer = tokenizer();
        Tester {
            compiler: Compiler::new(&tokenizer),
            tokenizer,
        }
    }

    fn fate_of(&self, grammar: &Grammar, text: &str) -> Fate {
        let guide = self.compiler.compile(grammar).unwrap();
        self.follow(guide, text)
    }

    fn follow(&self, mut guide: tegula_grammar::Guide, text: &str) -> Fate {
        let options = EncodeOptions {
            add_special: false,
            parse_special: false,
        };
        for id in self.tokenizer.encode(text, options) {
            if !guide.allowed().unwrap().contains(id) {
                return Fate::StoppedAt(String::from_utf8_lossy(&self.tokenizer.piece(id)).into());
            }
            guide.accept(id).unwrap();
        }
        let end = guide.allowed().unwrap();
        match self.tokenizer.eog().iter().any(|&id| end.contains(id)) {
            true => Fate::Accepted,
            false => Fate::Incomplete,
        }
    }

    fn refuses(&self, grammar: Grammar) -> String {
        self.compiler.compile(&grammar).unwrap_err().to_string()
    }
}

#[test]
fn a_schema_lets_valid_answers_through_and_no_others() {
    let t = Tester::new();
    let schema = Grammar::JsonSchema(json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": false
    }));
    for good in [
        r#"{"name":"Ada","age":36}"#,
        r#"{"name": "Ümit \"x\"", "age": 0}"#,
        "{\n  \"name\": \"\",\n  \"age\": 7\n}",
    ] {
        assert_eq!(t.fate_of(&schema, good), Fate::Accepted, "{good}");
    }
    assert_eq!(t.fate_of(&schema, r#"{"name":"A"#), Fate::Incomplete);
    for bad in [
        r#"{"name":"Ada","age":-1}"#,
        r#"{"age":1}"#,
        r#"[1]"#,
        r#"{"name":"Ada","age":1,"x":2}"#,
        "{          \"name\":\"\",\"age\":1}",
    ] {
        let fate = t.fate_of(&schema, bad);
        assert!(matches!(fate, Fate::StoppedAt(_)), "{bad}: {fate:?}");
    }
    let object = Grammar::JsonObject;
    assert_eq!(
        t.fate_of(&object, r#"{"a": [1, null, {"b": 1e3}]}"#),
        Fate::Accepted
    );
    assert!(matches!(t.fate_of(&object, "[]"), Fate::StoppedAt(_)));
    let anything = Grammar::JsonSchema(Value::Bool(true));
    assert_eq!(t.fate_of(&anything, "[]"), Fate::Accepted);
}

#[test]
fn expressions_match_as_a_whole() {
    let t = Tester::new();
    let date = Grammar::Regex(r"\d{4}-\d\d(-\d\d)?|n/a".to_owned());
    assert_eq!(t.fate_of(&date, "2026-11-26"), Fate::Accepted);
    assert_eq!(t.fate_of(&date, "n/a"), Fate::Accepted);
    assert_eq!(t.fate_of(&date, "2026-1"), Fate::Incomplete);
    assert!(matches!(t.fate_of(&date, "x2026-11"), Fate::StoppedAt(_)));
}

#[test]
fn lark_and_gbnf_say_the_same() {
    let t = Tester::new();
    let lark = r#"
start: sum
sum: product ("+" product)*
product: atom ("*" atom)*
atom: /[0-9]+/ | "(" sum ")"
"#;
    let gbnf = r#"
root    ::= product ("+" product)*   # sums
product ::= atom ("*" atom)*
atom    ::= [0-9]+ | "(" root ")"
"#;
    for grammar in [lark, gbnf] {
        let grammar = Grammar::Grammar(grammar.to_owned());
        assert_eq!(t.fate_of(&grammar, "1+2*(3+44)"), Fate::Accepted);
        assert_eq!(t.fate_of(&grammar, "(1"), Fate::Incomplete);
        assert!(matches!(t.fate_of(&grammar, "1+)"), Fate::StoppedAt(_)));
    }
    let words = Grammar::Grammar("root ::= [a-z]+ \"!\" | \"ab-\\x41\"".to_owned());
    assert_eq!(t.fate_of(&words, "absolutely!"), Fate::Accepted);
    assert_eq!(t.fate_of(&words, "ab-A"), Fate::Accepted);
    assert_eq!(t.fate_of(&words, "ab"), Fate::Incomplete);
}

#[test]
fn free_text_may_turn_into_a_call() {
    let t = Tester::new();
    let schema = json!({"type": "object", "properties": {"x": {"type": "integer"}},
                        "required": ["x"], "additionalProperties": false});
    let lark = format!(
        "start: PLAIN | before call (begin call)*\n\
         PLAIN: ~(/(?s:.*)/ \"<tool_call>\" /(?s:.*)/)\n\
         before[suffix=\"<tool_call>\"]: /(?s:.*)/\n\
         begin: /\\n?/ \"<tool_call>\"\n\
         call: \"\\n\" {} \"\\n</tool_call>\"\n",
        json_rule(&schema).unwrap()
    );
    let guide = t.compiler.compile_lark("tools", lark).unwrap();
    let follow = |text: &str| t.follow(guide.clone(), text);
    assert_eq!(follow("No call, 1 < 2, <tool is not one."), Fate::Accepted);
    assert_eq!(follow(""), Fate::Accepted);
    let call = "<tool_call>\n{\"x\": 1}\n</tool_call>";
    assert_eq!(follow(call), Fate::Accepted);
    assert_eq!(
        follow(&format!("Let me see. {call}\n{call}")),
        Fate::Accepted
    );
    assert_eq!(follow("Well: <tool_call>\n{\"x\""), Fate::Incomplete);
    assert!(matches!(follow("<tool_call>\n{\"y\""), Fate::StoppedAt(_)));
    assert!(matches!(
        follow(&format!("{call}, indeed")),
        Fate::StoppedAt(_)
    ));
}

#[test]
fn rules_quote_what_they_are_given() {
    let t = Tester::new();
    let text = "a \"b\" \\ /c/\n%d";
    let lark = format!("start: {}", literal_rule(text));
    assert_eq!(
        t.follow(t.compiler.compile_lark("x", lark).unwrap(), text),
        Fate::Accepted
    );
    let lark = format!("start: {}", regex_rule("a/b\\n\"?"));
    assert_eq!(
        t.follow(t.compiler.compile_lark("x", lark).unwrap(), "a/b\n\""),
        Fate::Accepted
    );
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let t = Tester::new();
    for (grammar, part) in [
        (
            Grammar::JsonSchema(json!([1])),
            "expected an object, found an array",
        ),
        (Grammar::JsonSchema(json!({"type": "nonsense"})), "nonsense"),
        (
            Grammar::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 4})),
            "JSON schema",
        ),
        (
            Grammar::JsonSchema(json!({"$ref": "https://example.com/schema.json"})),
            "JSON schema",
        ),
        (
            Grammar::JsonSchema(json!({"$ref": "file:///etc/passwd"})),
            "JSON schema",
        ),
        (Grammar::Regex("(".to_owned()), "regular expression"),
        (Grammar::Regex(r"a(?=b)".to_owned()), "regular expression"),
        (Grammar::Grammar("start: nowhere".to_owned()), "nowhere"),
        (
            Grammar::Grammar("root ::= nowhere".to_owned()),
            "there is no rule `nowhere`",
        ),
        (Grammar::Grammar("start: start".to_owned()), "grammar"),
        (Grammar::Grammar(String::new()), "grammar"),
        (
            Grammar::Regex("a".repeat(1 << 19)),
            "at most 262144 are allowed",
        ),
    ] {
        let message = t.refuses(grammar);
        assert!(message.contains(part), "{message}");
        assert!(!message.contains('\n') && message.len() < 600, "{message}");
    }
}

/// Each would take memory or time without bound if nothing bounded it: here they either fail
/// at once or cost a few steps.
#[test]
fn bombs_do_not_go_off() {
    let t = Tester::new();
    let mut refs = json!({"type": "object"});
    for i in 0..60 {
        // Each definition uses the next one twice.
        let next = format!("#/$defs/d{}", i + 1);
        refs["$defs"][format!("d{i}")] = json!({
            "type": "array", "prefixItems": [{"$ref": next}, {"$ref": next}],
            "minItems": 2, "items": false
        });
    }
    refs["$defs"]["d60"] = json!({"type": "null"});
    refs["properties"] = json!({"x": {"$ref": "#/$defs/d0"}});
    let any: Vec<Value> = (0..12)
        .map(|i| json!({"required": [format!("p{i}")]}))
        .collect();
    let bombs = [
        Grammar::Regex("((((a{1,1000}){1,1000}){1,1000}){1,1000})".to_owned()),
        Grammar::Regex("(a|b)*a(a|b){40}".to_owned()),
        Grammar::Regex(format!("{}a{}", "(".repeat(10_000), ")*".repeat(10_000))),
        Grammar::Regex("a{1000000000}".to_owned()),
        Grammar::Grammar(
            "root ::= a a a a\na ::= b b b b b b b b\nb ::= c{1,100000}\nc ::= \"x\"{1,100000}"
                .to_owned(),
        ),
        Grammar::Grammar("start: s\ns: s s | s s s | \"a\" | \"\"".to_owned()),
        Grammar::Grammar(format!(
            "start: {}\"a\"{}",
            "(".repeat(20_000),
            ")".repeat(20_000)
        )),
        Grammar::JsonSchema(refs),
        Grammar::JsonSchema(json!({"allOf": vec![json!({"anyOf": any}); 12]})),
        Grammar::JsonSchema(json!({"type": "string", "minLength": 100_000_000})),
        Grammar::JsonSchema(
            json!({"type": "array", "minItems": 1_000_000_000, "items": {"type": "array", "minItems": 1_000_000}}),
        ),
        Grammar::JsonSchema(
            json!({"enum": (0..15_000).map(|i| format!("{i:0>8}")).collect::<Vec<_>>()}),
        ),
    ];
    for (i, bomb) in bombs.iter().enumerate() {
        let start = std::time::Instant::now();
        if let Ok(mut guide) = t.compiler.compile(bomb) {
            for _ in 0..50 {
                let Ok(allowed) = guide.allowed() else { break };
                let Some(id) =
                    (0..t.tokenizer.vocab_size() as u32).find(|&id| allowed.contains(id))
                else {
                    break;
                };
                if t.tokenizer.is_eog(id) || guide.accept(id).is_err() {
                    break;
                }
            }
        }
        eprintln!("bomb {i}: {:?}", start.elapsed());
    }
}
