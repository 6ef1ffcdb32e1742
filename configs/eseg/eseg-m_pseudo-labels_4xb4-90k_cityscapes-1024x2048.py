# Self-training: Cityscapes, and a folder of further images with the labels that a trained model
# gives them. Make the labels first:
#   python tools/pseudo_labels.py CONFIG CHECKPOINT data/pseudo/images data/pseudo/labels
# Images without a confident pixel are not in its list of images and not trained on.
pseudo_root = 'data/pseudo'
pseudo_suffix = '.jpg'  # of the images; '.png' reads labels/images.png.txt

_base_ = [
    '../_base_/models/eseg-m.py',  # ESeg-M
    '../_base_/datasets/cityscapes_1024x2048.py',  # four crops of 1024 x 2048 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_90k_cosine-ema.py'  # SGD, cosine decay, EMA
]
crop_size = (1024, 2048)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor)

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            {{_base_.train_dataloader.dataset}},
            # The same classes and ids. Pixels that are 255 are ignored.
            dict(
                type='CityscapesDataset',
                data_root=pseudo_root,
                ann_file=f'labels/images{pseudo_suffix}.txt',
                data_prefix=dict(img_path='images', seg_map_path='labels'),
                img_suffix=pseudo_suffix,
                seg_map_suffix='.png',
                pipeline={{_base_.train_pipeline}})
        ]))
