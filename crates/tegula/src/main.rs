//! The program: `tegula COMMAND …`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tegula::main()
}
