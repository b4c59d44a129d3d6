"""SGLang's entry point for platforms of others: names ours."""


def activate() -> str:
    return "sglang_on_cpu_platform.PlainCpu"
