# HFGD with Swin-L, which was pretrained on ImageNet-22k at 384 x 384. A config adds the class-aware
# regularization of CAE: type='CAREncoderDecoder', car=dict(layer='encoder.out_conv')
head_norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
backbone_norm_cfg = dict(type='LN', requires_grad=True)
checkpoint_file = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_large_patch4_window12_384_22k_20220412-6580f57d.pth'
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='SwinTransformer',
        pretrain_img_size=384,
        patch_size=4,
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        strides=(4, 2, 2, 2),
        out_indices=(0, 1, 2, 3),
        window_size=12,
        mlp_ratio=4,
        qkv_bias=True,
        qk_scale=None,
        patch_norm=True,
        use_abs_pos_embed=False,
        drop_rate=0.,
        attn_drop_rate=0.,
        drop_path_rate=0.3,
        act_cfg=dict(type='GELU'),
        norm_cfg=backbone_norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(
        type='HFGDHead',
        in_channels=[192, 384, 768, 1536],
        in_index=[0, 1, 2, 3],
        channels=256,
        upsampler=dict(type='USFPNHead'),
        encoder=dict(
            type='ContextAugmentedEncoder',
            wide_channels=2048,
            attention_channels=512,
            qk_channels=64),
        guidance=True,
        axial_attention=True,
        stop_gradient=True,
        dropout_ratio=0.,
        num_classes=19,
        norm_cfg=head_norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
