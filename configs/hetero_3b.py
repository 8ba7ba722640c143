"""About 3 B parameters in heterogeneous experts (HMoE, arXiv 2408.10681): 8 a layer, in the hybrid proportions
1 1 1 1 2 2 4 4, two of them for every token, kept in balance by the parameter penalty.

Command:   python train.py configs/hetero_3b.py --data.sources.0.glob "texts/**/*.jsonl.zst"
Hardware:  16 chips of TPU v5e; checked without one: python -m jmoe.aot configs/hetero_3b.py --topology v5e:4x4
Expected:  fits: 5.4 of 16 GiB at the peak; a chip's step of 8,192 tokens compiles to 180 TFLOP,
           of the model 56, as the kernels of each of the three widths claim every row. Not trained yet
"""

from jmoe.config import AdamW, Config, Cosine, Data, Files, LayerGroup, Loss, Mesh, Model, MoE, TokenizerFile, TopK


def config() -> Config:
    experts = MoE(num_experts=8, d_ff=3072, widths="hybrid", router=TopK(2))
    return Config(
        model=Model(
            vocab_size=50304,
            d_model=1536,
            num_heads=12,
            num_kv_heads=12,
            head_dim=128,
            layers=(LayerGroup((experts,), repeats=24),),
        ),
        data=Data((Files("texts/**/*.jsonl.zst"),), tokenizer=TokenizerFile("tokenizer.json"), seq_len=2048),
        optim=AdamW(learning_rate=4e-4, schedule=Cosine(warmup_steps=2000)),
        loss=Loss(load_balance_loss=0.0, parameter_penalty=0.1, dynamic_loss=1e-4),
        mesh=Mesh(fsdp=-1),
        steps=200_000,
        batch_size=64,
        dtype="bfloat16",
        remat="full",
    )
